"""`quire bench NAME`: measurements, each a module of tools/bench.

A table for people goes to stdout; with --json stdout gets one JSON object, and the table stderr.
"""

from __future__ import annotations

import argparse
import importlib

BENCHES = {
    "throughput": "output tokens per second over a trace, all requests submitted at once",
    "pages": "a run at the limit of KV pages, beside one without that limit",
    "latency": "decode step by batch, time to first token, prefix hits",
    "long": "a very long prompt, cold and again from the prefix cache",
    "serve": "a running server under load, as its callers see it",
    "online": "a server of its own at several rates of requests",
    "soak": "whether a server leaks under callers of every kind",
    "fairness": "what a tenant sees while another asks for 50 times its share",
    "startup": "seconds from process start to first token, by phase, cold and warm",
    "kernels": "attention and KV write alone, beside the device's own limits",
    "profile": "where the milliseconds of a step go, by kind of kernel",
    "scheduler": "host time of a step, without a device",
    "replay": "a trace through the scheduler in virtual time, by a model of an H200's steps",
    "compare": "figures of these beside another engine's, and what is aimed at",
    "frontend": "what frontend processes cost and add, without a device",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, summary in BENCHES.items():
        sub = benches.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module = importlib.import_module(f".bench.{name}", __package__)
        module.add_arguments(sub)
        sub.set_defaults(run_bench=module.run)


def run(args: argparse.Namespace) -> None:
    args.run_bench(args)
