"""Build the site from the notebooks: execute what changed, write pages, let Sphinx make them HTML, and check every link.

    python tools/docs.py            the site stands in _site/html/, opens without a server or a network; work lies beside it
    python tools/docs.py --fresh    execute every notebook, also those whose sources and records are as they were
    python tools/docs.py --hold     write the outputs into the notebooks, too, to be committed
"""
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from execute import FIGURE, cache, flags, forks, held, hold, notebooks, replay, run_all

root = Path(__file__).resolve().parents[1]
FIRST = "tutorials explanations methods studies".split() # of the folders in the sidebar; rooms follow as the home page lists them


# --- pages ---------------------------------------------------------------------------------------------------------

def directives(source):
    "The `#|` lines on top of a cell as words, and the rest."
    top = flags(source)
    return {w for f in top for w in f[:1]}, "\n".join(source.splitlines()[len(top):]).strip("\n")


def only_imports(source):
    "Does a cell bring in names, or pass them on by `_all_`, and nothing else?"
    passes = lambda n: isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_all_"
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) or passes(n) for n in ast.parse(source).body)


def defined(source):
    "Names that a cell exports; a patched method as Class.name."
    for n in ast.parse(source).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            patched = any(ast.unparse(d).startswith("patch") for d in n.decorator_list)
            yield f"{ast.unparse(n.args.args[0].annotation)}.{n.name}" if patched else n.name
        if isinstance(n, ast.Assign): yield from (t.id for t in n.targets if isinstance(t, ast.Name))


class Names:
    "Every public name of the package and the page that explains it."
    def __init__(self, at, pages):
        self.at, self.of_page, self.home = at, {}, {}
        for p in pages:
            if module := self.module(p): self.of_page[p] = module
        for p, module in self.of_page.items():
            for n, obj in vars(importlib.import_module(f"cit_workbench.{module}")).items():
                own = getattr(obj, "__module__", None) == f"cit_workbench.{module}" and (inspect.isclass(obj) or inspect.isfunction(obj))
                if own and not n.startswith("_"): self.home.setdefault(n, []).append(p)

    def module(self, path):
        "What a page exports to, dotted."
        cells = json.loads(path.read_text())["cells"]
        found = re.search(r"^#\|\s*default_exp (\S+)", "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), re.M)
        return found and found[1]

    def link(self, name, here):
        "`name` as a link to where it is explained, if that is one other page."
        pages = self.home.get(name, [])
        if len(pages) != 1 or pages[0] == here or (name.islower() and "_" not in name): return None
        return f"[`{name}`](#{label(self.of_page[pages[0]], name)})"


def label(module, name, kind="api"):
    "The anchor of a name; Sphinx does not tell `Draw` from `draw`."
    return f"{kind}{'-class' if name[0].isupper() else ''}-{module}-{name}".replace(".", "-").replace("_", "-").lower()


def linked(text, here, names, at):
    "Markdown with links to names, pages and papers where it only mentions them; code blocks stay as they are."
    def paper(m): return f"[{m[0]}](https://arxiv.org/abs/{m[1]})"
    def tick(m):
        p = at/m[1]
        if m[1].endswith(".ipynb") and p.is_file() and p != here: return f"[`{p.stem}`]({os.path.relpath(p, here.parent)})"
        return names.link(m[1], here) or m[0]
    parts = re.split(r"(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\)|\$\$.*?\$\$)", text, flags=re.S | re.M)
    plain = lambda s: re.sub(r"arXiv:? ?(\d{4}\.\d{4,5})", paper, re.sub(r"`([\w./]+)`", tick, s))
    return "".join(s if i % 2 else plain(s) for i, s in enumerate(parts))


def themed(text, here):
    "Markdown in which a picture that has a dark twin stands as both; the theme chooses."
    def both(m):
        twin = m[2].replace("-light.", "-dark.")
        return f"{m[0]}{{.only-light}} ![{m[1]}]({twin}){{.only-dark}}" if (here.parent/twin).is_file() else m[0]
    return re.sub(r"!\[([^\]]*)\]\(([^)]*-light\.\w+)\)", both, text)


def reference(module, name):
    "A public name: signature, its line, a table of its parameters, and a link to the cell above that defines it."
    from fastcore.docments import docments
    obj = importlib.import_module(f"cit_workbench.{module}")
    for part in name.split("."): obj = inspect.getattr_static(obj, part) if isinstance(obj, type) else getattr(obj, part)
    head = f"({label(module, name)})=\n### `{name}`\n\n"
    source = f'<a href="#{label(module, name, "src")}">source</a>'
    if not (inspect.isclass(obj) or inspect.isfunction(obj)): return None
    says = (obj.__doc__ or "").strip() if "(" != (obj.__doc__ or "").strip().removeprefix(name.split(".")[-1])[:1] else ""
    rows = [(k, _type(v.anno), _default(v.default), v.docment or "") for k, v in docments(obj, full=True).items() if k != "self"]
    rows = [r for r in rows if r[0] != "return" or r[1] not in ("", "None") or r[3]]
    if not says and not any(r[3] for r in rows): return None
    cell = lambda t: " ".join(str(t).split()).replace("|", "\\|")
    code = lambda t: f"`{cell(t)}`" if t else ""
    table = "\n".join(f"| {code(k) if k != 'return' else '*returns*'} | {code(a)} | {code(d)} | {cell(t)} |" for k, a, d, t in rows)
    table = f"\n\n| name | type | default | |\n|---|---|---|---|\n{table}" if rows else ""
    return f"{head}{says} {source}{table}\n"


def _type(a):
    if a in (None, type(None)) or str(a) == "<class 'inspect._empty'>": return ""
    return a.__name__ if isinstance(a, type) and not getattr(a, "__args__", None) else str(a).replace("typing.", "")
def _default(d): return "" if str(d) == "<class 'inspect._empty'>" or type(d).__name__ == "_MISSING_TYPE" else still(repr(d))[:60]


def still(text):
    "Text without addresses in memory, which differ from build to build."
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def figure(fig):
    "A Plotly figure as data in the page; site.js draws it."
    data = json.dumps(fig, separators=(",", ":")).replace("</", "<\\/")
    return f'<div class="figure" style="height:{fig["layout"].get("height") or 420}px"><script type="application/json">{data}</script></div>'


def to_html(output):
    "An output whose links to notebooks lead to their pages, without addresses in memory; a figure as its data."
    if fig := output.get("data", {}).get(FIGURE): return {**output, "data": {"text/html": figure(fig)}}
    def turn(text): return re.sub(r"""((?:\]\(|href=["'])(?![a-z]+:)[^)"'#]*)\.ipynb""", r"\1.html", "".join(text))
    kinds, out = {"text/html": turn, "text/markdown": turn, "text/plain": lambda v: still("".join(v))}, dict(output)
    if "data" in output: out["data"] = {k: kinds[k](v) if k in kinds else v for k, v in output["data"].items()}
    if "text" in output: out["text"] = still("".join(output["text"]))
    return out


def page(nb, path, names, at):
    "An executed notebook as the page that people read."
    module, cells, found = names.of_page.get(path), [], []
    def add(kind, source, **kw): cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": source, **kw})
    for c in nb["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "markdown": add("markdown", linked(themed(source, path), path, names, at).replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md")); continue
        if c["cell_type"] != "code" or not source.strip(): continue
        told, source = directives(source)
        outputs = [to_html(o) for o in c.get("outputs", [])]
        if told & {"hide", "default_exp"} or (told & {"export", "exports"} and only_imports(source)): continue
        tags = [t for t in c["metadata"].get("tags", []) if t in ("parameters", "lesson")] + (["exported"] if told & {"export", "exports"} else [])
        if "exported" in tags and module:
            new = [n for n in defined(source) if not n.split(".")[-1].startswith("_")]
            anchors = "".join(f'<span id="{label(module, n, "src")}"></span>' for n in new)
            if anchors: add("markdown", anchors)
            found += [n for n in new if n not in found]
        add("code", source, outputs=outputs, execution_count=None)
        cells[-1]["metadata"]["tags"] = tags + (["remove-input"] if "echo:" in told else [])
    table = [r for n in found if (r := reference(module, n))] if module else []
    if table: add("markdown", "## Reference"); add("markdown", "\n".join(table))
    return {**nb, "cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}}


def sidebar(pages, nbs):
    "The folders of `nbs` as the trees of the home page; what that names comes first, in its order."
    home = (nbs/"index.ipynb").read_text()
    def place(p): return (at := home.find(p.relative_to(nbs).as_posix())) < 0, at, p
    folders = sorted({p.relative_to(nbs).parent.as_posix() for p in pages}, key=lambda f: (f == ".", FIRST.index(f) if f in FIRST else 9, home.find(f"`{f.split('/')[0]}`"), f))
    def tree(f):
        own = [p.relative_to(nbs).with_suffix("").as_posix() for p in sorted(pages, key=place) if p.parent == nbs/f and p.stem != "index"]
        if f == "." and (nbs.parent/"CONTRIBUTING.md").is_file(): own.append("CONTRIBUTING")
        caption = "library" if f == "." else f
        return f"```{{toctree}}\n:hidden:\n:caption: {caption.capitalize()}\n\n" + "\n".join(own) + "\n```\n"
    return "\n".join(map(tree, folders))


def write_pages(pages, at, work):
    "Write what Sphinx reads: pages and, beside them, the files that they point to."
    src, nbs = work/"src", at/"nbs"
    names, keep = Names(at, pages), set()
    for p in pages:
        nb = page(json.loads((work/"executed"/p.relative_to(nbs)).read_text()), p, names, at)
        if p == nbs/"index.ipynb": nb["cells"].append({"cell_type": "markdown", "id": "sidebar", "metadata": {}, "source": sidebar(pages, nbs)})
        keep.add(_write(src/"nbs"/p.relative_to(nbs), json.dumps(nb, ensure_ascii=False, indent=1)))
    for old in {*src.glob("nbs/**/*.ipynb")} - keep: old.unlink()
    for text in at.glob("CONTRIBUTING.md"): keep.add(_write(src/"nbs"/text.name, linked(text.read_text(), nbs/text.name, names, at)))
    for name in ("figures", "records", "sweeps", "LICENSE"):
        if (at/name).exists() and not (src/name).exists(): (src/name).symlink_to(at/name)
    return src/"nbs"


def _write(path, text):
    "Write only what differs, so that Sphinx reads only what changed."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text: path.write_text(text)
    return path


# --- checks --------------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "What a page points to, loads and defines."
    def __init__(self, path):
        super().__init__(); self.refs, self.loads, self.ids = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.refs.append(a["href"])
        if tag in ("script", "img", "iframe", "source", "video") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("search", "canonical", "next", "prev", "index", "genindex", "author"): self.loads.append(a["href"])


def broken(site):
    "What is wrong with the links of a built site: one sentence each."
    pages = {p.resolve(): Links(p) for p in site.rglob("*.html")}
    def wrong(here, ref, load):
        u = urlsplit(ref)
        if u.scheme in ("data", "mailto"): return None
        if u.scheme or u.netloc: return f"loads {ref} from another host" if load else None
        to = (here.parent/unquote(u.path)).resolve() if u.path else here
        if not to.exists(): return f"points to {ref}, which is not there"
        if u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids: return f"points to {ref}, an anchor that is not there"
    said = [f"{p.relative_to(site.resolve())} {w}" for p, k in pages.items() for load, refs in ((0, k.refs), (1, k.loads)) for r in refs if (w := wrong(p, r, load))]
    for css in site.rglob("*.css"):
        said += [f"{css.relative_to(site)} loads {m} from another host" for m in re.findall(r"(?:url\(|@import )['\"]?((?:https?:)?//[^'\")\s]+)", css.read_text(encoding="utf-8"))]
    return sorted(set(said))


def build(at=root, anew=False, holding=False, workers=2):
    "The whole way; seconds of its parts. Raises SystemExit with what is wrong."
    site, work, nbs, start = at/"_site/html", at/"_site/work", at/"nbs", time.time()
    if anew: shutil.rmtree(work, ignore_errors=True)
    for old in {*(work/"cache").glob("*")} - {cache(at)}: shutil.rmtree(old)
    pages = notebooks(nbs)
    out = {p: work/"executed"/p.relative_to(nbs) for p in pages}
    replayed = 0 if anew else replay(pages, at, out)
    took = run_all(pages, at, out, workers)
    if holding: hold(pages, at, out)
    executed = time.time(); sys.path.insert(0, str(at))
    if took: # the libraries are there already
        with forks(1) as pool: src = pool.submit(write_pages, pages, at, work).result()
    else: src = write_pages(pages, at, work)
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-j", str(workers), "-W", "--keep-going", "-c", str(root/"tools/site"),
               "-d", str(work/"doctrees"), str(src), str(site)]
    if subprocess.run(command).returncode: sys.exit("Sphinx found what stands above; the site is not complete")
    if said := broken(site): sys.exit("\n".join(said))
    return {"pages": len(pages), "executed": len(took), "replayed from the notebooks": replayed,
            "notebooks that hold older outputs (make outputs)": len(pages) - len(held(pages, at)),
            "seconds executing": round(executed - start), "seconds writing": round(time.time() - executed),
            "slowest": {p.relative_to(nbs).as_posix(): round(s) for p, s in sorted(took.items(), key=lambda o: -o[1])[:5]}}


if __name__ == "__main__":
    print(json.dumps(build(anew="--fresh" in sys.argv, holding="--hold" in sys.argv), indent=1))
