#!/usr/bin/env python3
"""Measure how the code reads: `python tools/style.py` prints a line per module and the totals.

    python tools/style.py                       every module, and the totals
    python tools/style.py --totals              the totals alone
    python tools/style.py core methods/ewc      these modules, with the functions and names to look at
    python tools/style.py --lessons             pages that have fewer than three lessons for two export cells
    python tools/style.py --tree FOLDER         another checkout, to compare with
"""
import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

WIDTH, LONG_FUNCTION, LONG_MODULE = 120, 25, 300
ARTICLES = {"a", "an", "the"}
OPENERS = {"what", "which", "who", "whose", "where", "when", "how", "why", "whether", "of", "in", "on", "for", "from", "with", "by",
           "at", "to", "as", "if", "one", "every", "each", "all", "no", "this", "that", "its", "and", "so", "only", "two", "these", "any"}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
# What is found by folder: the folder, and the function or base class that makes a module a member.
KINDS = {"method": ("methods/", "Method"), "suite": ("suites/", "load"), "family": ("models/families/", "Family"), "view": ("views/", "View")}
CHECKPOINT = {"state.json", "manifest.json", "checkpoints"}
MANY_NAMES = 12


def docstring_node(node: ast.AST):
    "Return the docstring's statement of a module, class or function, or None."
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
        return None
    value = body[0].value
    return body[0] if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def density(source: str, tree: ast.Module) -> tuple[int, int, int]:
    "Count syntax nodes, lines that hold code, and semicolons; docstrings and comments are left out."
    docstrings = {id(part) for node in ast.walk(tree) if (found := docstring_node(node)) for part in (found, found.value)}
    nodes = sum(isinstance(node, (ast.expr, ast.stmt)) and id(node) not in docstrings for node in ast.walk(tree))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines = {token.start[0] for token in tokens if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER)}
    semicolons = sum(token.type == tokenize.OP and token.string == ";" for token in tokens)
    return nodes, len(lines), semicolons


def bound_names(tree: ast.Module) -> list[str]:
    "List every name that is bound: parameters, assignments, loop variables; `_` and `self` do not count."
    names = [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [name for name in names if name not in ("_", "self", "cls")]


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    "List all functions, nested ones included."
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def length(function: ast.FunctionDef) -> int:
    "Count the lines of a function's body, its docstring left out."
    body = [statement for statement in function.body if statement is not docstring_node(function)]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def begins_with_verb(text: str) -> bool:
    "Tell whether a docstring's first word can be a verb: no article, question word, preposition, number or name in backticks."
    first = re.match(r"[A-Za-z]+", text.strip())
    word = first.group().lower() if first else ""
    return bool(word) and word not in ARTICLES | OPENERS and not re.search(r"(ed|tion|ness|ment)$", word)


def public_names(tree: ast.Module) -> list[str]:
    "Read the public names that a module defines from its `__all__`; names that it only passes on belong to other modules."
    passed = {name.asname or name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return [name for name in ast.literal_eval(node.value) if name not in passed]
    return []


def imports(tree: ast.Module, own: str, modules: set[str]) -> list[tuple[str, list[str], bool]]:
    "List what a module imports from the package, but for types alone: (module, names, whether inside a function)."
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    typing = {id(node) for block in tree.body if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
              for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing:
            continue
        words = (node.module or "").split(".")
        if node.level:
            words = [*own.split("/")[:-node.level], *words]
        elif words[0] == "cit_workbench":
            words = words[1:]
        else:
            continue
        module, names = "/".join(filter(None, words)), [name.name for name in node.names]
        inner = [(f"{module}/{name}".strip("/"), [name]) for name in names if f"{module}/{name}".strip("/") in modules]
        found += [(*target, id(node) in inside) for target in inner or [(module, names)] if target[0] in modules]
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    "Find the groups of modules that import each other, late imports included."
    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen
    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph if name in reach[name]}
    return [list(group) for group in sorted(groups)]


def patches(tree: ast.Module) -> list[str]:
    "List the classes that functions under `@patch` extend."
    marked = [f for f in functions(tree) if any(getattr(mark, "id", "") == "patch" for mark in f.decorator_list)]
    return [ast.unparse(f.args.args[0].annotation) for f in marked if f.args.args and f.args.args[0].annotation]


def measure(path: Path, name: str, modules: set[str]) -> dict:
    "Measure one module."
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    written = re.sub(r"^__all__ = \[.*?\]\n", "", source, flags=re.M | re.S)  # nbdev writes this list
    nodes, lines, semicolons = density(source, tree)
    names = bound_names(tree)
    documented = [(f.name, ast.get_docstring(f)) for f in functions(tree) if ast.get_docstring(f)]
    return dict(name=name, path=path, tree=tree, nodes=nodes, code=lines, lines=sum(bool(line.strip()) for line in source.splitlines()),
                semicolons=semicolons, wide=[line for line in written.splitlines() if len(line) > WIDTH], names=names,
                short=[n for n in names if len(n) == 1], functions=len(functions(tree)),
                long=[(f.name, length(f)) for f in functions(tree) if length(f) > LONG_FUNCTION],
                documented=documented, nouns=[f"{n}: {text.splitlines()[0]}" for n, text in documented if not begins_with_verb(text)],
                public=public_names(tree), imports=imports(tree, name, modules), patches=patches(tree),
                classes={node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)})


def survey(tree: Path) -> list[dict]:
    "Measure every module of a checkout."
    package = tree / "cit_workbench"
    paths = {str(path.relative_to(package).with_suffix("")): path for path in sorted(package.rglob("*.py"))
             if path.name not in ("_modidx.py", "__init__.py")}
    return [measure(path, name, set(paths)) for name, path in paths.items()]


def does_more(source: str) -> bool:
    "Tell whether a cell does more than import: there is something to teach, or to learn from."
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!", "#"))]
    try:
        body = ast.parse("\n".join(lines)).body
    except SyntaxError:
        return True
    return any(not isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def lessons_of(page: Path) -> tuple[int, int]:
    "Count the visible code cells and the export cells of a page that exports, cells of imports left out."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    code = [source for cell in cells if cell["cell_type"] == "code" and does_more(source := "".join(cell["source"]))]
    marks = [set(re.findall(r"#\|\s*(\w+)", re.match(r"(?:#\|.*\n?)*", source).group())) for source in code]
    exported = sum(bool(mark & {"export", "exporti"}) for mark in marks)
    shown = sum(not mark & {"export", "exporti", "hide", "default_exp"} for mark in marks)
    return (shown, exported) if exported else (0, 0)


def lessons(tree: Path) -> tuple[int, int]:
    "Count the lessons and the export cells of all pages that export."
    counts = [lessons_of(page) for page in sorted(tree.glob("nbs/**/*.ipynb"))]
    return sum(shown for shown, _ in counts), sum(exported for _, exported in counts)


def members(rows: list[dict], kind: str) -> set[str]:
    "Name the modules of a kind that is found by folder, by what its contract asks for: a function `load`, or a class of a base."
    folder, asked = KINDS[kind]
    def answers(node: ast.AST) -> bool:
        if isinstance(node, ast.FunctionDef):
            return node.name == asked
        return isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith(asked) for base in node.bases)
    return {row["name"] for row in rows if row["name"].startswith(folder) and any(answers(node) for node in row["tree"].body)}


def named_elsewhere(rows: list[dict], kind: str) -> list[str]:
    "List the modules outside the folder of a kind that import one of its members by name: a newcomer must edit them, too."
    found, folder = members(rows, kind), KINDS[kind][0]
    return [row["name"] for row in rows if not row["name"].startswith(folder) and {target for target, *_ in row["imports"]} & found]


def knowing_checkpoints(rows: list[dict]) -> list[str]:
    "List the modules that spell a file of a checkpoint, or the name of its folder."
    spelled = {row["name"]: {node.value for node in ast.walk(row["tree"]) if isinstance(node, ast.Constant)
                             and isinstance(node.value, str)} for row in rows}
    return [name for name, texts in spelled.items() if texts & CHECKPOINT]


def errands(rows: list[dict]) -> dict:
    "Count what a newcomer must edit for a new method, suite, family or view, and for another layout of checkpoints."
    found = {}
    for kind in KINDS:
        others = named_elsewhere(rows, kind)
        found[f"touched by a new {kind}"] = ", ".join(["its page", *others]) if members(rows, kind) else "no folder of this kind"
    return found | {"touched by other checkpoints": ", ".join(knowing_checkpoints(rows))}


def totals(rows: list[dict], tree: Path) -> dict:
    "Sum up the whole package."
    total = lambda key: sum(row[key] for row in rows)
    methods = [row for row in rows if row["name"].startswith("methods/")]
    names = [name for row in rows for name in row["names"]]
    away = [cls for row in rows for cls in row["patches"] if cls not in row["classes"]]
    documented = sum(len(row["documented"]) for row in rows)
    shown, exported = lessons(tree)
    return {"modules": len(rows), "lines that are not blank": total("lines"),
            "nodes a line": round(total("nodes") / total("code"), 2),
            "nodes a line, methods": round(sum(r["nodes"] for r in methods) / max(1, sum(r["code"] for r in methods)), 2),
            f"lines over {WIDTH} columns": sum(len(row["wide"]) for row in rows), "semicolons": total("semicolons"),
            "names of one letter": f"{sum(len(n) == 1 for n in names) / len(names):.1%}",
            f"functions over {LONG_FUNCTION} lines": f"{sum(len(r['long']) for r in rows)} of {total('functions')}"
                                                     f" ({sum(len(r['long']) for r in rows) / total('functions'):.1%})",
            f"modules over {LONG_MODULE} lines": sum(row["lines"] > LONG_MODULE for row in rows),
            "longest module": max((row["lines"], row["name"]) for row in rows),
            f"modules over {MANY_NAMES} public names": sum(len(row["public"]) > MANY_NAMES for row in rows),
            "most public names": max((len(row["public"]), row["name"]) for row in rows),
            "circles of modules": circles({row["name"]: {target for target, *_ in row["imports"]} - {row["name"]} for row in rows}),
            "imports inside functions": sum(late for row in rows for *_, late in row["imports"]),
            "@patch": sum(len(row["patches"]) for row in rows), "@patch on another page's class": len(away),
            "docstrings that begin with a verb": f"{1 - sum(len(r['nouns']) for r in rows) / documented:.1%} of {documented}",
            "lesson cells per export cell": round(shown / exported, 2), **errands(rows)}


def show(row: dict) -> None:
    "Print one module's line."
    print(f"{row['name']:<28} {row['lines']:>4} lines  nodes {row['nodes'] / max(1, row['code']):>5.1f}  wide {len(row['wide']):>2}  ; {row['semicolons']:>2}"
          f"  one letter {len(row['short']) / max(1, len(row['names'])):>4.0%}  long {len(row['long'])}  public {len(row['public']):>2}"
          f"  late {sum(late for *_, late in row['imports']):>2}  nouns {len(row['nouns'])}")


def explain(row: dict) -> None:
    "Print what to look at in one module."
    print("  one letter:", ", ".join(f"{name} ×{count}" for name, count in Counter(row["short"]).most_common()) or "none")
    print("  long functions:", ", ".join(f"{name} {lines}" for name, lines in row["long"]) or "none")
    for line in row["nouns"]:
        print("  no verb:", line)


def want_lessons(tree: Path) -> None:
    "Print the pages that have fewer than three lessons for two export cells, and how many are missing."
    for page in sorted(tree.glob("nbs/**/*.ipynb")):
        shown, exported = lessons_of(page)
        if 2*shown < 3*exported:
            print(f"{page.relative_to(tree)}: {exported} export cells, {shown} lessons; {(3*exported + 1)//2 - shown} more are wanted")


def main() -> int:
    "Measure the package of a checkout."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules to explain, such as core or methods/ewc")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout to measure")
    parser.add_argument("--totals", action="store_true", help="print the totals alone")
    parser.add_argument("--lessons", action="store_true", help="print the pages that want lessons")
    args = parser.parse_args()
    if args.lessons:
        want_lessons(args.tree)
        return 0
    rows = survey(args.tree)
    unknown = set(args.modules) - {row["name"] for row in rows}
    if unknown:
        sys.exit(f"unknown module {sorted(unknown)[0]!r}; allowed: {', '.join(row['name'] for row in rows)}")
    for row in rows if not args.totals else []:
        if not args.modules or row["name"] in args.modules:
            show(row)
            if args.modules:
                explain(row)
    if not args.modules:
        for what, value in totals(rows, args.tree).items():
            print(f"{what + ':':<36} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
