"""Compares what dgls_torch.comfy relies on with a ComfyUI checkout: ``contract.py COMFYUI_DIR``.

Reads both as text, so that nothing of ComfyUI has to be installed. Every function and method of the
fake that the tests run against has to have the real one's parameters, in the same order, and every
network class of ComfyUI has to be in the table of block containers, with containers that it has.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "python" / "comfy_fake"
TABLE = ROOT / "torch_ext" / "dgls_torch" / "comfy" / "containers.py"
# Where a name is defined when it is not in the file of the same path.
ELSEWHERE = {"comfy_api/latest.py": ["comfy_api/latest/_io.py", "comfy_api/latest/__init__.py"]}
ALSO = {"server.py": ["execution.py"]}
# What the fake has for its own use.
OWN = {
    *("files", "names", "free_bytes", "calculate_weight", "_set_param", "_Field", "_kind"),
    *("cast_bias_weight", "annotations", "PromptServer.instance", "asked_to_unpin"),
}
# Networks of ComfyUI that no sampler of pictures runs block by block.
OTHERS = {"RTv4", "SAM3Model", "DepthAnything3Net", "MoGeModelV1", "MoGeModelV2"}

# Classes of the table that no tiny network stands for, and why.
UNTRIED = {"MiniMaxMusic3DiT": "its dimensions are fixed at 7 GB"}
SPECS = [ROOT / "tests" / "comfy" / f"{name}specs.py" for name in ("", "network_", "more_network_")]

Functions = dict[str, list[str]]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return [*names, *(["**"] if arguments.kwarg else [])]


def read(path: Path) -> tuple[Functions, set[str]]:
    """Functions and methods with their parameters, and all names that a file defines."""
    functions: Functions = {}
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for item in body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[prefix + item.name] = parameters(item)
            elif isinstance(item, ast.ClassDef):
                names.add(prefix + item.name)
                visit(item.body, f"{prefix}{item.name}.")
            elif isinstance(item, (ast.Assign, ast.AnnAssign)):
                targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))
            elif isinstance(item, (ast.If, ast.Try)):
                visit(item.body, prefix)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return functions, names


def check_signatures(comfyui: Path) -> list[str]:
    problems = []
    for path in sorted(FAKE.rglob("*.py")):
        relative = path.relative_to(FAKE).as_posix()
        if path.name == "__init__.py" or relative in ELSEWHERE:
            continue
        real_functions, real_names = read(comfyui / relative)
        for more in ALSO.get(relative, []):
            functions, names = read(comfyui / more)
            real_functions, real_names = functions | real_functions, names | real_names
        functions, names = read(path)
        for name, wanted in functions.items():
            if name.split(".")[0] in OWN or name.startswith("LoadedModel._"):
                continue
            found = real_functions.get(name)
            if found is None:
                problems.append(f"{relative}: ComfyUI has no {name}")
            elif found[: len(wanted)] != wanted and "**" not in found:
                problems.append(f"{relative}: {name}{tuple(wanted)} is {tuple(found)}")
        missing = {n for n in names if not OWN & {n, n.split(".")[0]}} - real_names
        problems += [f"{relative}: ComfyUI has no {name}" for name in sorted(missing)]
    return problems


def check_nodes(comfyui: Path) -> list[str]:
    """The node API: classes by name, and the fields of a schema that are used."""
    defined: set[str] = set()
    for files in ELSEWHERE.values():
        for file in files:
            functions, names = read(comfyui / file)
            defined |= names | set(functions)
    wanted = [
        *("Schema", "NodeOutput", "Hidden.unique_id", "Hidden.extra_pnginfo", "Model", "Combo"),
        *("Boolean", "Int", "String", "AnyType", "Custom", "ComfyExtension", "ComfyExtension"),
        *(f"Schema.{f}" for f in ("node_id", "display_name", "category", "description")),
        *(f"Schema.{f}" for f in ("search_aliases", "inputs", "outputs", "hidden")),
        *("Schema.is_output_node", "ComfyExtension.get_node_list"),
    ]
    return [f"comfy_api: there is no {name}" for name in wanted if name not in defined]


def classes(comfyui: Path) -> dict[str, tuple[list[str], str]]:
    """Every class below comfy/ldm: the names of its bases, and its text."""
    found: dict[str, tuple[list[str], str]] = {}
    for path in sorted((comfyui / "comfy" / "ldm").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for item in ast.parse(text).body:
            if isinstance(item, ast.ClassDef):
                bases = [ast.unparse(base).split(".")[-1] for base in item.bases]
                source = ast.get_source_segment(text, item) or ""
                old = found.get(item.name, ([], ""))
                found[item.name] = ([*old[0], *bases], old[1] + source)
    return found


def text_of(name: str, known: dict[str, tuple[list[str], str]]) -> str:
    """A class's text and that of the classes it is made from."""
    bases, source = known.get(name, ([], ""))
    return source + "".join(text_of(base, known) for base in bases if base != name)


def check_networks(comfyui: Path) -> list[str]:
    scope: dict[str, object] = {}
    tree = ast.parse(TABLE.read_text(encoding="utf-8"))
    tables = [i for i in tree.body if isinstance(i, (ast.Assign, ast.AnnAssign))]
    tables = [i for i in tables if "nn." not in ast.unparse(i)]
    exec(compile(ast.Module(tables, []), str(TABLE), "exec"), scope)
    table, unsupported = scope["CONTAINERS"], scope["UNSUPPORTED"]
    assert isinstance(table, dict)
    assert isinstance(unsupported, dict)
    known = classes(comfyui)
    problems = []
    for name, paths in table.items():
        text = text_of(name, known)
        if not text:
            problems.append(f"containers: ComfyUI has no network {name}")
            continue
        firsts = {path.split(".")[0] for path in paths}
        absent = [first for first in firsts if f"self.{first}" not in text]
        if absent == list(firsts) or paths[0].split(".")[0] in absent:
            problems.append(f"containers: {name} has no {', '.join(absent)}")
    served = {*table, *unsupported, *OTHERS}
    problems += [
        f"containers: {name} of comfy/model_base.py is not in the table"
        for name in sorted(networks(comfyui) & set(known) - served)
    ]
    tried = {n for file in SPECS for n in re.findall(r'"net": "[\w.]*\.(\w+)"', file.read_text())}
    problems += [f"specs: no tiny {name}" for name in table if name not in {*tried, *UNTRIED}]
    return problems


def networks(comfyui: Path) -> set[str]:
    """The network classes that comfy/model_base.py makes, given or by default."""
    found = set()
    text = (comfyui / "comfy" / "model_base.py").read_text(encoding="utf-8")
    for item in ast.walk(ast.parse(text)):
        if isinstance(item, ast.keyword) and item.arg == "unet_model":
            found.add(ast.unparse(item.value).split(".")[-1])
        elif isinstance(item, ast.FunctionDef):
            arguments = item.args.args[len(item.args.args) - len(item.args.defaults) :]
            for argument, default in zip(arguments, item.args.defaults, strict=True):
                if argument.arg == "unet_model":
                    found.add(ast.unparse(default).split(".")[-1])
    return found


def main() -> int:
    comfyui = Path(sys.argv[1])
    problems = [*check_signatures(comfyui), *check_nodes(comfyui), *check_networks(comfyui)]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"contract with {comfyui.name}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
