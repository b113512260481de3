"""The devices of this process, working together: a mesh of `data` by `model`.

Windows, variants and chunks of rows are dealt out along `data`, rows of matrices and heads along `model`. Nothing that
is added up lies on several devices: results come back to the host and sums over windows are taken there, as with one
device, so that it does not matter to a bit how many there are. With one device everything here passes on what it gets.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

DATA, MODEL = "data", "model"


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """All devices of this process, `data · model` in number; by default all of them along `data`.

    Raises `ValueError` where they do not fill it.
    """
    found = jax.local_devices()
    data = len(found) // model if data is None else data
    if data * model != len(found):
        raise ValueError(
            f"a mesh of {data}x{model} has places for {data * model} devices and there "
            f"{'is 1' if len(found) == 1 else f'are {len(found)}'}; choose two numbers whose product is {len(found)}."
        )
    return jax.make_mesh((data, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=found)


_default = functools.cache(make_mesh)
_CHOSEN: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def use(mesh: Mesh | None) -> None:
    """Compute on this mesh of `make_mesh` from now on; None is the default one.

    JAX's own `set_mesh` would cut what is computed outside of this module as well.
    """
    _CHOSEN.set(mesh)


def current() -> Mesh | None:
    """The mesh in use, by default all devices along `data`; None where there is only one device."""
    mesh = _CHOSEN.get() or _default()
    return None if mesh.size == 1 else mesh


def count() -> int:
    """How many devices work together."""
    mesh = current()
    return 1 if mesh is None else mesh.size


def width(axis: str = DATA) -> int:
    """How many of them lie along an axis of the mesh."""
    mesh = current()
    return 1 if mesh is None else mesh.shape[axis]


def placed(tree: Any, spec: P | None = None) -> Any:
    """Arrays cut over the devices as `spec` says, by default whole on each; what lies there already stays."""
    mesh = current()
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, P() if spec is None else spec))


def along_data(run: Callable[..., Any], *arrays: Float[Array, "W ..."]) -> Any:
    """`run(*arrays)`, which computes every window by itself, with the windows dealt out along `data`.

    They are filled up with zeros to a number that divides. Where there are several devices, results are on the host.
    """
    mesh = current()
    if mesh is None:
        return run(*arrays)
    count = len(arrays[0])
    short = -count % width()
    filled = [np.pad(np.asarray(a), [(0, short)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
    with jax.set_mesh(mesh):
        found = run(*placed(filled, P(DATA)))
    return jax.tree.map(lambda a: a[:count], jax.device_get(found))


def each(run: Callable[..., Any], items: Iterable[tuple[Any, ...]], *rest: Any) -> Iterator[Any]:
    """`run(*item, *rest)` of every item, in order; as many at a time as there are devices, one on each.

    Items have arrays of the same shapes. `run` is a function or a `functools.partial` of one. Where there are several
    devices, results are on the host.
    """
    mesh = current()
    if mesh is None:
        yield from (run(*item, *rest) for item in items)
        return
    known = run if isinstance(run, functools.partial) else functools.partial(run)
    together = _on_every_device(known.func, known.args, tuple(sorted(known.keywords.items())), mesh)
    rest = placed(rest)
    items = iter(items)
    while group := list(itertools.islice(items, mesh.size)):
        filled = group + group[-1:] * (mesh.size - len(group))
        stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *filled)
        found = jax.device_get(together(placed(stacked, P((DATA, MODEL))), rest))
        yield from (jax.tree.map(lambda a, i=i: a[i], found) for i in range(len(group)))


@functools.lru_cache(maxsize=256)
def _on_every_device(
    function: Callable[..., Any], first: tuple[Any, ...], keywords: tuple[Any, ...], mesh: Mesh
) -> Any:
    """`function` of one item on each device, from items that are stacked; one compilation per shape."""

    def one(item: Any, rest: tuple[Any, ...]) -> Any:
        found = function(*first, *jax.tree.map(lambda a: a[0], item), *rest, **dict(keywords))
        return jax.tree.map(lambda a: a[None], found)

    every = P((DATA, MODEL))
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(every, P()), out_specs=every, check_vma=False))


def whole(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """x with all its channels on each device that computes with it, so that no sum over them is cut."""
    return x if _rows_together() else _constrained(x, *[P.UNCONSTRAINED] * (x.ndim - 1), None)


def by_head(heads: int, *arrays: Float[Array, "B T N H"]) -> tuple[Float[Array, "B T N H"], ...]:
    """Arrays whose heads, groups of which share one of `heads`, lie along `model` where these divide, else on all."""
    if _rows_together():
        return arrays
    across = MODEL if heads % jax.sharding.get_abstract_mesh().shape[MODEL] == 0 else None
    return tuple(_constrained(a, P.UNCONSTRAINED, None, across, None) for a in arrays)


def _rows_together() -> bool:
    """Whether what is being compiled is not cut along `model`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get(MODEL, 1) == 1 or AxisType.Manual in mesh.axis_types


def _constrained(x: jax.Array, *spec: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P(*spec))
