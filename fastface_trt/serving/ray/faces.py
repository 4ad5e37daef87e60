"""Registered faces of all replicas in one actor, so that a face may be named to any of them.

They are in the memory of one process of the cluster and nowhere else: they expire there, they are
gone when that process dies or the application is deployed with other code, and they survive an
update of the checkpoint and the death of replicas.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastface_trt.errors import FastFaceError, Unavailable
from fastface_trt.runtime.face import Face
from fastface_trt.serving.http.faces import FaceRegistry, RegisteredFace

ACTOR = "faces"
"""Name of the actor within the deployment."""


class FaceActor:
    """A `FaceRegistry` whose answers are values, errors of clients too.

    Ray would wrap an exception in one of its own.
    """

    def __init__(self, ttl: float, capacity: int) -> None:
        self._registry = FaceRegistry(ttl, capacity)

    def call(self, method: str, *arguments: Any) -> tuple[Any, FastFaceError | None, int]:
        """Call a method of the registry: its result, or its error; and how many faces there are."""
        result, failure = None, None
        try:
            result = getattr(self._registry, method)(*arguments)
        except FastFaceError as error:
            failure = error
        return result, failure, len(self._registry)


class SharedFaces:
    """`Faces` in a `FaceActor`; `ask` calls its `call`.

    Raises `Unavailable` while the actor is away. It is started again by Ray Serve, empty.
    """

    def __init__(self, ask: Callable[..., Awaitable[Any]]) -> None:
        self._ask = ask
        self._count = 0

    @property
    def count(self) -> int:
        """How many there were when this replica last asked."""
        return self._count

    async def add(self, owner: str, face: Face) -> RegisteredFace:
        one: RegisteredFace = await self._call("add", owner, face)
        return one

    async def get(self, owner: str, name: str) -> RegisteredFace:
        one: RegisteredFace = await self._call("get", owner, name)
        return one

    async def of(self, owner: str) -> list[RegisteredFace]:
        faces: list[RegisteredFace] = await self._call("of", owner)
        return faces

    async def delete(self, owner: str, name: str) -> None:
        await self._call("delete", owner, name)

    async def forget_expired(self) -> None:
        try:
            await self._call("forget_expired")
        except Unavailable:
            self._count = 0  # the actor is away, and all faces with it

    def close(self) -> None:
        """Nothing: the faces are those of other replicas too."""

    async def _call(self, method: str, *arguments: Any) -> Any:
        result, failure, self._count = await self._ask(method, *arguments)
        if failure is not None:
            raise failure
        return result


async def ask_actor(method: str, *arguments: Any) -> Any:
    """Call the deployment's `FaceActor` from one of its replicas; raises `Unavailable`."""
    from ray import serve
    from ray.exceptions import RayActorError

    try:
        # By name each time: after its death another actor has the name.
        return await serve.get_deployment_actor(ACTOR).call.remote(method, *arguments)
    except (RayActorError, ValueError) as problem:
        raise Unavailable(
            "Registered faces are not there at the moment.",
            "Try again in a moment; faces registered before have to be registered again.",
        ) from problem
