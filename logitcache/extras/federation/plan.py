"""The check of a federation file before its first round."""

from __future__ import annotations

from logitcache.extras.federation.configuration import Federation
from logitcache.stages.dry_run import Inspection, RunPlan, Step


def plan_federation(federation: Federation, *, trust: bool = False, load_all: bool = True) -> RunPlan:
    """Check the names in a federation and list each party's share; see `plan_run`.

    Raises:
        UsageError: an unknown name, or a parameter that does not fit.
    """
    inspection = Inspection(trust=trust, load_all=load_all)
    inspection.data(federation.public.data)
    inspection.views(federation.public.views)
    for party in federation.parties:
        if party.data is not None:
            inspection.data(party.data)
        if party.views is not None:
            inspection.views(party.views)
        if party.net is not None:
            inspection.model(party.net)
    steps = [Step("federate", f"{party.name}, {federation.rounds} rounds", False) for party in federation.parties]
    return inspection.plan(steps)
