"""`fastkl.integrations.verl` beside verl's own fused head. verl is not among the packages of the tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("verl")
module = pytest.importorskip("verl.utils.experimental.torch_functional")
from fastkl.integrations.verl import use  # noqa: E402


@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head_is_that_of_verl(shape: tuple[int, ...], temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 8, generator=g).requires_grad_()
    weight = torch.randn(37, 8, generator=g).requires_grad_()
    tokens = torch.randint(37, shape, generator=g)

    def run() -> tuple[Any, ...]:
        found = module.FusedLinearForPPO()(hidden, weight, tokens, temperature)
        above = torch.linspace(-1.0, 2.0, tokens.numel()).reshape(shape)
        gradients = torch.autograd.grad((found[0] * above).sum() - 0.3 * found[1].sum(), (hidden, weight))
        return *found, *gradients

    theirs, before = run(), module.FusedLinearForPPOFunction
    with use():
        assert module.FusedLinearForPPOFunction is not before
        with use():
            ours = run()
    assert module.FusedLinearForPPOFunction is before
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "FusedLinearForPPOFunction")
    with pytest.raises(RuntimeError, match=r"does not fit verl .*has no FusedLinearForPPOFunction"):
        use()
