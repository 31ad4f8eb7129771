"""Makes DuoServe's demo model again from scratch: text, training, evaluation, export.

On Debian 12 (see README.md in duoserve/demo for the packages and for what came out):
    python scripts/make_demo.py corpus   --work build/demo
    python scripts/make_demo.py train    --work build/demo --steps 2000 --decay-steps 1000
    python scripts/make_demo.py export   --work build/demo --out duoserve/demo
    python scripts/make_demo.py evaluate --work build/demo --model duoserve/demo
Training may be killed at any time; the same command goes on from the last checkpoint. `--resume step-1000.safetensors`
branches from a kept one, for instance into an earlier decay.
"""

import argparse
from pathlib import Path


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus, train, evaluate, export = (commands.add_parser(n) for n in ("corpus", "train", "evaluate", "export"))
    for command in (corpus, train, evaluate, export):
        command.add_argument("--work", type=Path, default=Path("build/demo"), help="text, tokens and checkpoints")
    train.add_argument("--steps", type=int, default=2000, help="last step, 8192 tokens each")
    train.add_argument("--decay-steps", type=int, default=1000, help="steps at the end with falling learning rate")
    train.add_argument("--resume", type=Path, help="checkpoint to start from (default: the latest in --work)")
    evaluate.add_argument("--model", type=Path, default=Path("duoserve/demo"))
    export.add_argument("--checkpoint", type=Path, help="default: the latest in --work")
    export.add_argument("--out", type=Path, default=Path("duoserve/demo"))
    return parser.parse_args()


def main():
    """Imports follow the command: reading text needs no torch."""
    args = parse()
    if args.command == "corpus":
        import demo_corpus

        demo_corpus.build(args.work)
    elif args.command == "train":
        import demo_train

        demo_train.train(args.work, args.steps, args.decay_steps, args.resume)
    elif args.command == "evaluate":
        import demo_export

        demo_export.evaluate(args.work, args.model)
    else:
        import demo_export

        demo_export.export(args.work, args.checkpoint or args.work / "latest.safetensors", args.out)


if __name__ == "__main__":
    main()
