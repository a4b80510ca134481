"""`python -m bench`: see --help."""

import argparse
import sys
import time
from pathlib import Path

import torch

from . import backends, harness, record

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times the ops and their rivals.")
    parser.add_argument("--op", nargs="+", help="ops to time (default: all that have a benchmark)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="WHAT",
        help="groups of cases, and FIELD=VALUE for only such shapes: main qwen N=2880 (default: all but the sweeps)",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help='only these, as in "gram loop"')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--compile", action="store_true", help="also the baselines through torch.compile")
    parser.add_argument("--quick", action="store_true", help="few samples: to see that it works, not to quote")
    parser.add_argument("--seconds", type=float, help="start no further case after so many")
    parser.add_argument("--list", action="store_true", help="list ops, groups and providers")
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed, with bytes and flops")
    parser.add_argument("--csv", type=Path, help="append rows here (default: bench/results/<device>.csv)")
    parser.add_argument("--commit", help="what to record as commit where there is no git checkout")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the rows of --csv instead of measuring")
    backends.add_argument(parser)
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device: expected cpu or cuda, got {args.device!r}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {args.device}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no CUDA GPU")
    return parser, args


def chosen(case, shapes, dtypes, device):
    groups = [s for s in shapes or () if "=" not in s]
    fields = dict(s.split("=", 1) for s in shapes or () if "=" in s)
    if case.cuda_only and device.type != "cuda":
        return False
    if dtypes and case.columns()["dtype"] not in dtypes:
        return False
    if case.group not in groups if groups else case.group.startswith("sweep"):
        return False
    return all(str(case.columns().get(name, "")) == value for name, value in fields.items())


def providers_of(bench, args):
    return [
        p
        for p in bench.providers(args.device)
        if (args.compile or not p.compiles) and (not args.providers or p.name in args.providers)
    ]


def show(row):
    shape = " ".join(f"{name}={row[name]}" for name in record.SHAPE if name in row)
    if row["data"] != "gaussian":
        shape += f" {row['data']}"
    mode = row["mode"] + (" cold" if row["cold_l2"] else "")
    times = f"{row['p20_us']:>11} {row['p50_us']:>11} {row['p80_us']:>11}"
    print(
        f"{row['op']:<24} {shape:<34} {row['dtype']:<9} {row['provider']:<24} {mode:<11} {times} "
        f"{row['percent_of_peak']:>6}% of {row['peak']}",
        flush=True,
    )


def describe(benches, args):
    for name, bench in benches.items():
        if bench is None:
            print(f"{name}: no benchmark")
            continue
        groups = dict.fromkeys(case.group for case in bench.cases)
        print(f"{name}: {', '.join(groups)}")
        print(f"    providers: {' | '.join(p.name for p in bench.providers(args.device))}")


def main(argv=None) -> int:
    parser, args = parse(argv)
    csv = args.csv or record.default_csv(args.device)
    if args.plot:
        from . import plot

        return plot.main(csv, args.plot)
    if args.threads:
        torch.set_num_threads(args.threads)
    benches = harness.discover()
    if unknown := set(args.op or ()) - set(benches):
        parser.error(f"--op: no op {', '.join(sorted(unknown))}; there are {', '.join(benches)}")
    if args.list:
        describe(benches, args)
        return 0
    work = [
        (bench, case)
        for name, bench in benches.items()
        if bench and (not args.op or name in args.op)
        for case in bench.cases
        if chosen(case, args.shapes, args.dtype, args.device)
    ]
    if not work:
        parser.error("nothing to time with these options; --list shows ops and groups")
    if not args.dry_run:
        compiled_wanted = not args.providers or {"native", "triton"} & set(args.providers)
        names = dict.fromkeys(bench.op for bench, _ in work)
        backends.stop_unless_compiled(args.device, names, allowed=args.allow_reference or not compiled_wanted)
    offered = dict.fromkeys(p.name for bench, _ in work for p in bench.providers(args.device))
    if unknown := [name for name in args.providers or () if name not in offered]:
        parser.error(f"--providers: no {', '.join(unknown)} on {args.device}; there are {', '.join(offered)}")
    if args.dry_run:
        for bench, case in work:
            cost = bench.cost(case)
            names = [p.name for p in providers_of(bench, args) if p.fits(case, args.device)]
            print(f"{bench.op}  {case}\n    {cost.bytes:.4g} bytes, {cost.flops:.4g} flops: {' | '.join(names)}")
        return 0

    begun = time.monotonic()
    effort = harness.QUICK if args.quick else harness.NORMAL
    run, rows = harness.start(args.device, effort, {case.dtype for _, case in work}, args.commit)
    record.append(csv, rows)
    print(f"{run.environment['device']}, {run.environment['threads']} threads, torch {torch.__version__}, -> {csv}")
    print("ceilings measured:", ", ".join(f"{row['provider']} {row['dtype'] or 'bytes'} {row['peak']}" for row in rows))
    print(f"{'':<106}{'p20 us':>11} {'p50 us':>11} {'p80 us':>11}")
    for number, (bench, case) in enumerate(work):
        if args.seconds and time.monotonic() - begun > args.seconds:
            print(f"{args.seconds:g} s are over; left out: {len(work) - number} cases, from {bench.op}, {case}")
            break
        rows = []
        for row in run.rows(bench, case, providers_of(bench, args)):
            show(row)
            rows.append(row)
        record.append(csv, rows)
    if run.failures:
        print(f"\n{len(run.failures)} FAILED:", *run.failures, sep="\n  ")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
