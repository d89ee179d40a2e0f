"""Several servers as one, on Ray Serve, each adapter's requests on the replica that has it.

    client ─ Ray's proxy ─ Front ── key of the adapters ──▶ AffinityRouter ─▶ Replica   engine + app
                             │    (one hop, whole batches       │             Replica   engine + app
                             └ API key, size of the body        └ affinity.py    │
                                                                            Catalog   which adapters

affinity.py     which replica first: the policy alone, also what bench/fleet.py simulates
router.py       that policy as Ray Serve's request router
front.py        the ingress: reads a body, asks a replica, asks another one if that was lost
forwarding.py   one HTTP request as a message, and an ASGI app that answers it
catalog.py      which adapters are served; a load is on all replicas or on none
member.py       an engine that agrees with the catalog
replica.py, ingress.py   the two as deployments of Ray Serve; application.py puts them together
exposition.py   one page of metrics from all replicas
run.py          `loramux serve --replicas`

Only router, replica, ingress, application and run import ray, which is an extra.
"""
