"""What a run may end with, other than success. The CLI turns each into its exit code."""


class UserError(Exception):
    """A problem the user can mend: bad config, bad input, bad path. Exit code 2.

    Args:
        *problems: one line each: what is wrong, where, and the remedy. All known problems are given at once.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class Diverged(Exception):
    """The loss or a gradient became non-finite beyond policy. Exit code 3."""


class Preempted(Exception):
    """SIGTERM or SIGINT arrived; the state was saved. Run the same command again. Exit code 75."""


class PeerLost(Exception):
    """A process of the run did not come, died or hangs. Exit code 1; run the same command again."""
