"""Workers of a Dask cluster as an executor for sweeps (extra `dask`)."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from effattn.errors import RequestError

#: Seconds to wait for the scheduler to answer.
CONNECTING = 10


class Cluster(concurrent.futures.Executor):
    """The cluster's executor, which also tells how many workers there are: none is started again for certain.

    Dask's nanny gives up on a worker that ends before the nanny has seen it start (`distributed.nanny`, `_on_worker_exit`).
    """

    def __init__(self, client: Any, pool: concurrent.futures.Executor) -> None:
        self._client, self._pool = client, pool

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        return self._pool.submit(fn, *args, **kwargs)

    def count_workers(self) -> int:
        """How many there are now; one where the scheduler is gone, of which the futures tell."""
        try:
            return len(self._client.nthreads())
        except OSError:
            return 1


@contextlib.contextmanager
def executor(address: str, *, device: str) -> Iterator[tuple[Cluster, int]]:
    """The cluster at `address`, host:port of its scheduler, and how many workers it has.

    Workers must have one thread each, since the time limit of a case ends the process. For `device` "cuda" they must
    declare `--resources GPU=1`, and one case runs on each GPU at a time. A worker that dies is started again by its
    nanny.

    Raises:
        RequestError: nobody answers, the cluster has no worker, or one that does not fit.
    """
    try:
        from distributed import Client
    except ImportError:
        raise RequestError(
            "this needs Dask, which is not installed; install it with `pip install 'effattn[dask]'`"
        ) from None
    try:
        client = Client(f"tcp://{address}", timeout=CONNECTING, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"no Dask scheduler answers at {address}: {error}; start one with `dask scheduler` and name its address"
        ) from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise RequestError(f"the Dask cluster at {address} has no worker; start some with `dask worker`")
        threads = sorted({worker["nthreads"] for worker in workers.values()})
        if threads != [1]:
            raise RequestError(
                f"workers of the Dask cluster at {address} have {threads[-1]} threads; expected one, since the time "
                "limit of a case ends its process. Start them with --nthreads 1"
            )
        resources = None
        if device == "cuda":
            without = sum(1 for worker in workers.values() if not worker.get("resources", {}).get("GPU"))
            if without:
                raise RequestError(
                    f"{without} of {len(workers)} workers declare no GPU; start one for each with --resources GPU=1"
                )
            resources = {"GPU": 1}
        with client.get_executor(pure=False, retries=0, resources=resources) as pool:
            yield Cluster(client, pool), len(workers)
