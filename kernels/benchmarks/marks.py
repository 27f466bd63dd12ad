"""What the project promises on a GPU, compared with what check_gpu.py measured: a row for every mark, PASS or MISS.

Marks of layers are for one path, which is what the default initialiser makes; the figure of two paths stands beside.
Where a mark covers several shapes, the worst one counts and is named. Figures without a mark are rows without a verdict.
"""

from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

__all__ = ["Mark", "marks", "table"]

MAIN = ((8192, 28672), (11008, 4096))  # out, in: shapes that have marks at many tokens
Rows = List[Dict[str, Any]]


class Mark(NamedTuple):
    """A promise and what was found."""

    name: str
    limit: Optional[float]  # None: a figure without a mark
    most: bool  # the limit is the most that may be found, else the least
    found: Optional[float]
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        if self.limit is None:
            return ""
        return "PASS" if (self.found <= self.limit if self.most else self.found >= self.limit) else "MISS"


def marks(parts: Dict[str, Any]) -> List[Mark]:
    """All marks, from the results of the parts by name; a part that is missing or failed leaves its marks unmeasured."""
    results = {name: part.get("result") or {} for name, part in parts.items()}

    def result(name: str) -> Dict[str, Any]:
        return results.get(name) or {}

    found = [*_cases(parts.get("cases") or {}), *_host(result("host")), *_layers(result("bench"))]
    for model in ("llama2-7b", "llama-3.2-1b"):
        found += _models(model, result(model))
    return [*found, *_training(result("train"))]


def _cases(part: Dict[str, Any]) -> Iterable[Mark]:
    counts = (part.get("result") or {}).get("counts")
    if counts is None:
        yield Mark("cases that fail", 0, True, None)
        return
    # pytest ends with 1 where tests failed; with anything else, tests are missing.
    broken = [name for name, how in part.get("failed", {}).items() if how["rc"] != 1]
    note = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    note += f"; cut off: {', '.join(broken)}" if broken else ""
    yield Mark("cases that fail", 0, True, float(counts.get("failed", 0) + len(broken)), note)


def _host(result: Dict[str, Any]) -> Iterable[Mark]:
    if result.get("driver") == "idle":
        result = {}
    rows = result.get("rows", [])

    def spent(call: str, tokens: int) -> Optional[float]:
        return max((row["us"] for row in rows if row["call"] == call and row["tokens"] == tokens), default=None)

    for tokens, limit in ((1, 30), (32, 40)):
        dense = spent("nn.Linear", tokens)
        note = "" if dense is None else f"nn.Linear {dense:.1f}"
        yield Mark(
            f"host µs of an eager call, {tokens} token(s)",
            limit,
            True,
            spent("LittleBitLinear, one path", tokens),
            note,
        )


def _layers(result: Dict[str, Any]) -> Iterable[Mark]:
    rows: Rows = result.get("rows", [])
    floor = result.get("floor_us")

    def chosen(paths: int, batch: int, bpw: float, gradient: bool, shapes: Any) -> Rows:
        keys = {"paths": paths, "batch": batch, "bpw": bpw, "gradient": gradient}
        return [
            row
            for row in rows
            if all(row[key] == value for key, value in keys.items())
            and (shapes is None or (row["out"], row["in"]) in shapes)
        ]

    def worst(
        name: str,
        limit: float,
        value: Callable[[Dict[str, Any]], float],
        where: Tuple[int, float, bool, Any],
        most: bool = False,
    ) -> Mark:
        batch, bpw, gradient, shapes = where
        extreme = max if most else min
        each = [chosen(paths, batch, bpw, gradient, shapes) for paths in (1, 2)]
        if not each[0]:
            return Mark(name, limit, most, None)
        row = extreme(each[0], key=value)
        note = f"{row['out']}x{row['in']}" if len(each[0]) > 1 else ""
        if shapes is not None and len(each[0]) < len(shapes):
            note += f" (only {len(each[0])} of {len(shapes)} shapes)"
        if each[1]:
            note += f" two paths: {extreme(map(value, each[1])):.2f}"
        return Mark(name, limit, most, value(row), note.strip())

    def speed(row: Dict[str, Any]) -> float:
        return row["bf16"] / row["packed"]

    yield worst("1 token, 0.1, 8192x28672: times dense", 25, speed, (1, 0.1, False, MAIN[:1]))
    square = ((4096, 4096),)
    if floor:
        name = "1 token, 0.1, 4096x4096: times two empty launches"
        yield worst(name, 1.7, lambda row: row["packed"] / floor, (1, 0.1, False, square), most=True)
    else:
        yield Mark("1 token, 0.1, 4096x4096: times two empty launches", 1.7, True, None)
    yield worst("1 token, 0.55, 4096x4096: times dense", 3, speed, (1, 0.55, False, square))
    one = {
        (row["out"], row["in"], row["bpw"], row["paths"]): row["packed"]
        for row in rows
        if row["batch"] == 1 and not row["gradient"]
    }

    def growth(row: Dict[str, Any]) -> float:
        return row["packed"] / one.get((row["out"], row["in"], row["bpw"], row["paths"]), float("nan"))

    for bpw in (0.1, 0.55, 1.0):
        name = f"4 tokens, {bpw}: times one token"
        yield worst(name, 1.5, growth, (4, bpw, False, ((8192, 28672), (4096, 4096))), most=True)
    for tokens in (16, 64):
        yield worst(f"{tokens} tokens, 0.55, every shape: times dense", 1, speed, (tokens, 0.55, False, None))
    for tokens in (512, 2048):
        for bpw, limit in ((0.1, 2.0), (0.55, 1.2), (1.0, 0.85)):
            name = f"{tokens} tokens, {bpw}, 8192x28672 and 11008x4096: times dense"
            yield worst(name, limit, speed, (tokens, bpw, False, MAIN))
    for tokens in (512, 2048):
        yield worst(f"gradient of {tokens} tokens, 0.55: times dense", 1, speed, (tokens, 0.55, True, None))
    for row in result.get("shared", []):
        name = f"{row['layers']} together, {row['bpw']}, {row['paths']} path(s): times apart"
        yield Mark(name, None, False, row["apart"] / row["together"])


def _models(model: str, result: Dict[str, Any]) -> Iterable[Mark]:
    rows: Rows = result.get("rows", [])
    first = model == "llama2-7b"  # the marks are for this one

    def mark(name: str, mode: str, prompt: int, batch: int, step: str, limit: Optional[float]) -> Mark:
        keys = {"mode": mode, "prompt": prompt, "batch": batch}
        row = next((row for row in rows if all(row[key] == value for key, value in keys.items())), None)
        name = f"{model}, {name}: times dense"
        if row is None or step not in row["ratio"]:
            return Mark(name, limit, False, None)
        speeds = [f"{row['models'][kind][step]:.0f}" for kind in ("packed", "dense")]
        return Mark(name, limit, False, row["ratio"][step], f"{' against '.join(speeds)} tok/s")

    yield mark("plain decode", "plain", 32, 1, "decode", 1.2 if first else None)
    yield mark("eager decode", "eager", 32, 1, "decode", 1.2 if first else None)
    yield mark("compiled decode", "compiled", 32, 1, "decode", 2.46 if first else None)
    yield mark("plain prefill of 512", "plain", 512, 1, "prefill", 1.2 if first else None)
    for batch in (8, 32):
        for mode in ("plain", "eager"):
            yield mark(f"{mode} decode, batch of {batch}", mode, 32, batch, "decode", None)


def _training(result: Any) -> Iterable[Mark]:
    rows: Rows = result if isinstance(result, list) else []
    for bpw in (0.3, 0.55):
        row = next((row for row in rows if row["bpw"] == bpw), None)
        yield Mark(f"a training step, {bpw}: times dense", None, True, None if row is None else row["ratio"])


def table(found: List[Mark]) -> str:
    """The marks as lines of text."""
    lines = [f"{'':66}{'mark':>9}{'found':>9}  {'':13}"]
    for mark in found:
        limit = "" if mark.limit is None else f"{'≤' if mark.most else '≥'} {mark.limit:g}"
        value = "-" if mark.found is None else f"{mark.found:.2f}"
        lines.append(f"{mark.name:66}{limit:>9}{value:>9}  {mark.verdict:13}{mark.note}".rstrip())
    counted = [mark.verdict for mark in found if mark.limit is not None]
    verdicts = ("PASS", "MISS", "not measured")
    lines.append(", ".join(f"{counted.count(verdict)} {verdict}" for verdict in verdicts))
    return "\n".join(lines)
