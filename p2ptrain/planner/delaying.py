"""Whether the backwards of a run can be in two parts, so that gradients may be delayed."""

from __future__ import annotations

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.training.contract import Contract


def against_delaying(manifest: Manifest, contract: Contract) -> str | None:
    """Why gradients cannot be delayed: that takes backwards in parts, and stashes that stay."""
    if contract.rematerialise:
        return "rematerialised backwards stay whole"
    if any(kind.forms[contract.form].parts for kind in manifest.kinds.values()):
        return None
    remedy = "export the model again" if contract.form == "portable" else "use --form portable"
    return f"the bundle has no {contract.form} backwards in two parts; {remedy}"
