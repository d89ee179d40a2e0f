"""Ray's errors in our words."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from loramux.errors import (
    AdapterExists,
    EngineError,
    EngineStopped,
    LoramuxError,
    Overloaded,
    ReplicaLost,
)
from loramux.replicas.remote import own

TAKEN = AdapterExists("taken", field="lora_name")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ActorDiedError(), ReplicaLost),
        (ActorUnavailableError("gone", b"0" * 16), ReplicaLost),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (DeploymentUnavailableError(DeploymentID("Replica", "loramux")), EngineStopped),
        (RayTaskError("load", "traceback", TAKEN), AdapterExists),
        (TAKEN, AdapterExists),
        (KeyError("x"), EngineError),
    ],
)
def test_each_error_of_ray_is_one_of_ours(error: Exception, kind: type[LoramuxError]) -> None:
    told = own(error)
    assert type(told) is kind and "traceback" not in str(told)
