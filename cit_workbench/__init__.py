"A notebook-first research workbench for continual instruction tuning of large multimodal models."
__version__ = "0.0.1"

_home = dict(Run="train", Method="method", Phase="method", get_method="method", all_methods="method", Record="live",
             branch="live", get_stream="stream", all_streams="stream", get_backbone="backbone", all_backbones="backbone",
             CitError="core")
__all__ = list(_home)


def __getattr__(name):
    "Import a public name from its module on first use: `import cit_workbench` itself loads nothing heavy (PEP 562)."
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_home[name]}"), name)


def __dir__(): return sorted({*globals(), *_home})
