"""`quire bench compare FILE...`: our figures beside another engine's, and what we aim at.

Reads what `--json` of our benchmarks wrote; data/peers_h200.json has the peers' figures and how
they were measured. Several files of one benchmark are repetitions of it. What was measured on
another device, of another model or in another way is refused, and the refusal names both.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import TYPE_CHECKING, Any

from ...errors import InvalidConfig
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from .findings import Findings
    from .peers import PeerData, Peers

_TITLES = {
    "decode_step_ms": "decode step, batch {}, ms",
    "trace_output_tok_s": "trace, output tok/s",
    "ttft_ms": "first token, {} prompt tokens, ms",
    "prefix_10k_ms/cold": "10,000 tokens, the first time, ms",
    "prefix_10k_ms/hit": "the same 10,000 tokens again, ms",
    "long_cold_ms": "{} tokens, the first time, ms",
    "long_hit_ms": "the same {} tokens again, ms",
    "page_limit_ratio": "at the limit of pages, of the tokens a second with all",
    "start_to_first_token_s/cold_caches": "start to first token, nothing stored, s",
    "start_to_first_token_s/warm_compile_cache": "start to first token, stored programs, s",
}
_KINDS = {
    "output_tok_s": "output tok/s",
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_ms": "time between messages",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="what --json of throughput, latency, startup, online, serve, long or pages wrote",
    )
    parser.add_argument(
        "--any-device",
        action="store_true",
        help="also compare what was measured on another device than the peers', and say so",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    from .findings import read_findings, remarks_on
    from .peers import PeerData

    data = PeerData()
    by_model: dict[str, tuple[Peers, list[Findings]]] = {}
    notes: list[str] = []
    for file in args.files:
        found = read_findings(file)
        peers = _peers_of(found, data)
        if (other := _other_device(found, data)) is not None:
            if not args.any_device:
                raise InvalidConfig(f"{other}; --any-device compares all the same")
            notes.append(f"not the same device: {other}")
        by_model.setdefault(peers.section, (peers, []))[1].append(found)
    models = {name: _lines(peers, all_of) for name, (peers, all_of) in by_model.items()}
    for _, all_of in by_model.values():
        notes += [remark for found in all_of for remark in remarks_on(found)]
    results = {
        "peers": {"engine": data.engine, "hardware": data.hardware},
        "files": list(args.files),
        "notes": list(dict.fromkeys(notes)),
        "models": models,
    }
    tables = [_table(name, lines, results) for name, lines in models.items()]
    finish(args, results, tables, lambda figure: _draw(figure, results), on_device=False)


def _peers_of(found: Findings, data: PeerData) -> Peers:
    peers = data.of(found.model, found.dtype)
    if peers is None:
        raise InvalidConfig(
            f"{found.file}: model: ours {found.model} in {found.dtype}, the peers' "
            f"{', '.join(data.models)}"
        )
    return peers


def _other_device(found: Findings, data: PeerData) -> str | None:
    """How a file's device is not the peers'."""
    if found.device != data.device:
        ours = found.device or "not named in the file"
        return f"{found.file}: device: ours {ours}, the peers' {data.device}"
    if found.devices != 1:
        return f"{found.file}: device: ours {found.devices} of {found.device}, the peers' one"
    return None


def _lines(peers: Peers, files: list[Findings]) -> list[dict[str, Any]]:
    """A line a figure, in the order of the files."""
    from .findings import figures_in
    from .peers import Goal

    values: dict[str, list[float]] = {}
    first: dict[str, Findings] = {}
    for found in files:
        for name, several in figures_in(found, peers).items():
            before = first.setdefault(name, found)
            if before.settings != found.settings:
                raise InvalidConfig(
                    f"{found.file}: {name}: settings {found.settings}, those of {before.file} "
                    f"{before.settings}; compare them one after the other"
                )
            values.setdefault(name, []).extend(several)
    lines = []
    for name, ours in values.items():
        theirs, whose = _theirs(name, first[name], peers)
        goal = peers.goals.get(name, Goal())
        ours_median = median(ours)
        higher = name.endswith(("tok_s", "ratio"))
        line: dict[str, Any] = {
            "name": name,
            "metric": _title(name) + (f" (peers' at {whose})" if whose else ""),
            "better": "higher" if higher else "lower",
            "ours": ours_median,
            "lowest": min(ours),
            "highest": max(ours),
            "measured": len(ours),
            "peer": theirs,
            "ratio": None if theirs is None else ours_median / theirs,
            "limit": goal.limit,
            "target": goal.target,
            "stretch": goal.stretch,
            "is_met": None,
        }
        if goal.target is not None:
            line["is_met"] = ours_median >= goal.target if higher else ours_median <= goal.target
        lines.append(line)
    return lines


def _theirs(name: str, found: Findings, peers: Peers) -> tuple[float | None, str]:
    """The peers' figure, and with which setting it was reached where they have several: with as
    many requests at once as ours, or else their best."""
    if name != "trace_output_tok_s":
        return peers.figures.get(name), ""
    several = {k: v for k, v in peers.figures.items() if k.startswith(f"{name}/")}
    same = f"{name}/max_num_seqs={found.settings.get('max_num_seqs')}"
    key = same if same in several else max(several, key=lambda k: several[k])
    return several[key], key.partition("/")[2]


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    head, *rest = name.split("/")
    if head != "online":
        return _TITLES[head].format(f"{int(rest[0]):,}")
    rate, figure = rest
    kind, _, percentile = figure.rpartition("_p")
    what = f"{_KINDS[kind]} p{percentile}, ms" if kind else _KINDS[figure]
    return f"online {rate} req/s, {what}"


def _table(model: str, lines: list[dict[str, Any]], results: dict[str, Any]) -> Any:
    from rich.markup import escape

    peers = results["peers"]
    title = f"{model} beside {peers['engine']} on {peers['hardware']}"
    made = table(
        title, "", "ours", "lowest", "highest", "of", "peers", "ours / peers", "limit", "target",
        "stretch", "",
    )  # fmt: skip
    for line in lines:
        numbers = (line[name] for name in ("ours", "lowest", "highest"))
        met = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[line["is_met"]]
        ratio = "" if line["ratio"] is None else _coloured(line)
        goals = (_number(line[name]) for name in ("limit", "target", "stretch"))
        made.add_row(
            line["metric"],
            *map(_number, numbers),
            str(line["measured"]),
            _number(line["peer"]),
            ratio,
            *goals,
            met,
        )
    for note in results["notes"]:
        made.add_row(f"[yellow]{escape(note)}[/]")
    return made


def _coloured(line: dict[str, Any]) -> str:
    ahead = line["ratio"] >= 1 if line["better"] == "higher" else line["ratio"] <= 1
    return f"[{'green' if ahead else 'red'}]{line['ratio']:.2f}[/]"


def _number(value: float | None) -> str:
    """Of a size that three figures say: 4.32, 26.5, 233, 12,295."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """How far ours are ahead of the peers' (above 1), whatever the unit."""
    both = {
        model: [line for line in lines if line["ratio"] is not None]
        for model, lines in results["models"].items()
    }
    rows = [max(len(lines), 1) + 2 for lines in both.values()]
    figure.set_size_inches(9, max(5.0, 0.25 * sum(rows)))
    panes = figure.subplots(len(both), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (model, lines) in zip(panes, both.items(), strict=True):
        axes.set_title(model)
        if not lines:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no figure that the peers have", ha="center")
            continue
        ahead = [
            line["ratio"] if line["better"] == "higher" else 1 / line["ratio"] for line in lines
        ]
        axes.axvline(1, color="0.4", linestyle=":", zorder=0)
        bars = axes.barh([line["metric"] for line in lines], ahead)
        readable = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, fmt="{:.2f}", fontsize=8, padding=3, bbox=readable)
        axes.set_xlim(0, 1.1 * max(1.0, *ahead))
        axes.invert_yaxis()
        axes.set_xlabel("times as good as the peers")
        axes.tick_params(axis="y", labelsize=8)
