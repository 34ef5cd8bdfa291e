"""The acceptor of the Paxos instance that decides the next view; all of its state is durable."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_messages import AcceptedView
from p2ptrain.agreement.view import View


@dataclass(slots=True)
class Acceptor:
    """What this peer promised and accepted for the view after the present one."""

    promised: Ballot | None = None
    accepted: AcceptedView | None = None

    def prepare(self, ballot: Ballot) -> bool:
        """Promise the ballot unless a higher one is promised; whether it is promised now."""
        if self.promised is not None and ballot < self.promised:
            return False
        self.promised = ballot
        return True

    def accept(self, ballot: Ballot, value: View) -> bool:
        """Accept unless a higher ballot is promised; whether it is accepted now."""
        if not self.prepare(ballot):
            return False
        self.accepted = AcceptedView(ballot=ballot, value=value)
        return True
