"A notebook-first research workbench for continual instruction tuning of large multimodal models."
__version__ = "0.0.1"

_home = dict(Run="training.train", Method="contract.method", Phase="contract.method", get_method="contract.registry", all_methods="contract.registry", Record="live.live:LiveRun",
             branch="live.branch", get_stream="data.stream", all_streams="data.stream", get_backbone="models.backbone", all_backbones="models.backbone",
             CitError="core.errors")
__all__ = list(_home)


def __getattr__(name):
    "Import a public name from its module on first use: `import cit_workbench` itself loads nothing heavy (PEP 562)."
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    module, _, own = _home[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), own or name)


def __dir__(): return sorted({*globals(), *_home})


def main():
    "The program `cit`: from its first line on an interrupt is one sentence, and text is UTF-8 whatever the locale."
    import os
    import signal
    import sys

    def interrupted(*args):
        os.write(2, b"cit: interrupted; the same command goes on from what is recorded\n")
        os._exit(130)
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded: signal.signal(signal.SIGINT, interrupted)
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", "ascii:replace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from .cli import main as command_line
    try:
        if heeded: signal.signal(signal.SIGINT, signal.default_int_handler)
        command_line()
    except KeyboardInterrupt: interrupted()
