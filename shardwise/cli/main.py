"""`shardwise VERB ...`: start what takes long first, then hand over to the verb, and turn errors into one paragraph."""

from __future__ import annotations

import sys

EARLY = (
    "train",
    "plan",
    "verify",
    "cluster",
)  # these need torch in another process, whose import takes longer than all of the command line


def main(argv: list[str] | None = None) -> None:
    """The `shardwise` command. Exits with 0, the code of the error that ended it, or 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] and words[0] in EARLY and "--help" not in words:
        from shardwise.train.start import early

        early(words)
    sys.exit(run(words))


def run(words: list[str]) -> int:
    """Run one command line and return its exit code. What is no user's mistake passes through, with its traceback."""
    from shardwise.errors import ShardwiseError

    try:
        from shardwise.cli.app import build

        build()(words, prog_name="shardwise")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except KeyboardInterrupt:
        return 130
    except ShardwiseError as error:
        sys.stderr.write(f"shardwise: {error}\n")
        return error.exit_code
    except OSError as error:
        return _full_disk(error)
    return 0


def _full_disk(error: OSError) -> int:
    """A full disk is never our bug, wherever it is met; any other OSError here is one."""
    import errno

    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    place = f" that holds {error.filename}" if error.filename else ""
    sys.stderr.write(f"shardwise: the disk{place} is full. Free some space, or put runs elsewhere with --runs DIR.\n")
    return 8


if __name__ == "__main__":
    main()
