"""Every error a person can meet: the sentence, the next move and the exit code.

The docstring of a class is the sentence that is printed when no better one is given; `hint` is
the next move; `exit_code` is fixed. README lists the same table.
"""

from __future__ import annotations

from collections.abc import Iterator


class P2PTrainError(Exception):
    """Something went wrong in p2ptrain."""

    exit_code = 1
    hint = "run the command again with --verbose and report what it prints"

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message if message is not None else (type(self).__doc__ or "").strip())
        if hint is not None:
            self.hint = hint

    @property
    def message(self) -> str:
        """What happened and why, one sentence without a full stop."""
        return str(self.args[0]).rstrip(".")


class ConfigError(P2PTrainError):
    """What was asked for does not make sense here."""

    exit_code = 2
    hint = "see p2ptrain COMMAND --help"


class NotFound(ConfigError):
    """There is no such group, run, bundle or file."""

    hint = "check the name; p2ptrain status lists what this device knows"


class DataError(ConfigError):
    """The training data cannot be used."""

    hint = "give a readable file that holds at least one sample"


class PortInUse(ConfigError):
    """Another program already listens on this port."""

    hint = "choose another with --port, or --port 0 for any free one"


class PeerNotRunning(ConfigError):
    """No peer runs on this device for this group."""

    hint = "start one with: p2ptrain join --group NAME"


class PeerAlreadyRunning(ConfigError):
    """A peer for this group already runs on this device."""

    hint = "use the running one, or stop it first"


class TrustError(P2PTrainError):
    """The other side, or a file of ours, cannot be trusted."""

    exit_code = 3
    hint = "see trust/README.md; ask a member for a new invite"


class PlanInfeasible(P2PTrainError):
    """No placement fits this model on the peers in view."""

    exit_code = 4
    hint = "add a peer, use smaller microbatches, or allow more memory with --memory"


class WireError(P2PTrainError):
    """The conversation with another peer broke its rules."""

    exit_code = 5
    hint = "update p2ptrain on both devices; the link is dialled again by itself"


class LocalProtocolError(WireError):
    """We broke the protocol: a bug in this p2ptrain."""


class RemoteProtocolError(WireError):
    """The other peer broke the protocol; its link was closed."""


class PeerLost(P2PTrainError):
    """A peer that takes part in the run is gone."""

    exit_code = 6
    hint = "go on with the peers that are left: p2ptrain train --group NAME --resume RUN"


class GraphError(P2PTrainError):
    """A graph cannot be built, split or trusted."""

    exit_code = 7
    hint = "export the model again with tools/export_model.py"


class BundleError(GraphError):
    """The bundle is missing, damaged or not one this version reads."""

    hint = "check the path, or export the model again with tools/export_model.py"


class EngineError(P2PTrainError):
    """onnxruntime is missing, damaged or refused a graph."""

    exit_code = 8
    hint = "reinstall with: pip install --force-reinstall p2ptrain"


class NumericsError(P2PTrainError):
    """A loss or gradient is not finite; the step was not applied."""

    exit_code = 9
    hint = "lower the learning rate, or resume from the last checkpoint"


class CheckpointError(P2PTrainError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = 10
    hint = "resume another run, or start afresh without --resume"


class ProblemsFound(P2PTrainError):
    """The doctor found something that keeps a peer alone or slow."""

    exit_code = 11
    hint = "do the next step of the first problem, then run p2ptrain doctor again"


class Interrupted(P2PTrainError):
    """Stopped on request; the run can be resumed."""

    exit_code = 130
    hint = "go on with: p2ptrain train --group NAME --resume RUN"


class InvariantBroken(RuntimeError):
    """An internal rule does not hold: a bug. The peer stops rather than train on."""


def unwrap(error: BaseException) -> BaseException:
    """The one error a person should read out of nested exception groups.

    Trio reports failures of concurrent tasks as groups. The first P2PTrainError that is not a
    mere Interrupted wins, then Interrupted, then the first error of any kind.
    """
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, P2PTrainError)]
    broken = [leaf for leaf in leaves if isinstance(leaf, InvariantBroken)]
    serious = [leaf for leaf in ours if not isinstance(leaf, Interrupted)]
    return next(iter([*broken, *serious, *ours, *leaves]), error)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def error_class(name: str) -> type[P2PTrainError]:
    """The class another process named; P2PTrainError itself for an unknown name."""
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, P2PTrainError):
        return found
    return P2PTrainError


def first_error(group: BaseExceptionGroup[P2PTrainError]) -> P2PTrainError:
    """The error to show of several that ended together: the first that is not a consequence.

    A lost peer usually breaks several links at once; any other error explains more.
    """
    leaves = [leaf for leaf in _leaves(group) if isinstance(leaf, P2PTrainError)]
    causes = [error for error in leaves if not isinstance(error, PeerLost)]
    return (causes or leaves)[0]
