"""Layout: `resolve` is arithmetic over any degrees, `require_implemented` says what the engine can run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.engine.config import InputError, Layout
from strop.engine.parallel.mesh import Mesh


@given(st.tuples(*[st.integers(1, 4)] * 6), st.integers(1, 32))
def test_resolve_fills_in_the_replicas(degrees: tuple[int, ...], ranks: int) -> None:
    tp, cp, pp, vpp, ep, etp = degrees
    layout = Layout(tp=tp, cp=cp, pp=pp, vpp=vpp if pp > 1 else 1, ep=ep, etp=etp)
    if ranks % (tp * cp * pp) or ranks // pp % (ep * etp):
        with pytest.raises(InputError):
            layout.resolve(ranks)
        return
    resolved = layout.resolve(ranks)
    assert resolved.dp * tp * cp * pp == ranks
    assert resolved.resolve(ranks) == resolved
    assert {**vars(resolved), "dp": 0} == vars(layout)


@pytest.mark.parametrize(
    ("layout", "ranks", "message"),
    [
        (Layout(tp=0), 8, "--layout.tp 0: must be at least 1"),
        (Layout(etp=-1), 8, "--layout.etp -1: must be at least 1"),
        (Layout(sp=True), 8, "--layout.sp needs --layout.tp of at least 2"),
        (Layout(vpp=2), 8, "--layout.vpp 2 needs --layout.pp of at least 2"),
        (Layout(tp=2, pp=3), 8, "8 ranks can't hold tp 2 x cp 1 x pp 3 = 6: start a multiple of 6 ranks"),
        (Layout(tp=2, dp=2), 8, "layout has dp 2 but 8 ranks give dp 4: start 4 ranks"),
        (Layout(pp=2, ep=8), 8, "ep 8 x etp 1 doesn't divide dp x cp x tp = 4"),
    ],
)
def test_resolve_refuses(layout: Layout, ranks: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        layout.resolve(ranks)
    assert str(caught.value).startswith(message)


def test_data_parallelism_is_implemented() -> None:
    Layout().require_implemented()
    Layout(dp=8).require_implemented()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=2), "--layout.tp 2 is not implemented yet: use --layout.tp 1"),
        (Layout(tp=2, sp=True), "--layout.tp 2 is not implemented yet"),
        (Layout(cp=2), "--layout.cp 2 is not implemented yet"),
        (Layout(pp=2), "--layout.pp 2 is not implemented yet"),
        (Layout(vpp=2), "--layout.vpp 2 is not implemented yet"),
        (Layout(ep=2), "--layout.ep 2 is not implemented yet"),
        (Layout(etp=2), "--layout.etp 2 is not implemented yet"),
        (Layout(schedule="dualpipe"), "--layout.schedule dualpipe / --layout.cp-kind ring has no effect without pp / cp"),
        (Layout(cp_kind="ulysses"), "--layout.schedule 1f1b / --layout.cp-kind ulysses has no effect"),
    ],
)
def test_everything_else_is_refused_by_name(layout: Layout, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for run in (layout.require_implemented, lambda: Mesh.start(layout, "cpu")):
        with pytest.raises(InputError) as caught:
            run()
        assert str(caught.value).startswith(message)
