"""Patch projections as matrix products: the same numbers, gradients and files as the convolution."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from unime_st import UniME, UniMEReranker
from unime_st.backbones.patch_projection import PatchProjection, replace_patch_projections
from unime_st.scoring.loading import load_cross_encoder


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_are_those_of_the_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv3d(3, 8, (2, 14, 14), (2, 14, 14), bias=bias)).double()
    ours = copy.deepcopy(plain)
    replace_patch_projections(ours)
    patches = torch.randn(5, 3, 2, 14, 14, dtype=torch.float64)
    grads = []
    for layers in (plain, ours):
        given = patches.clone().requires_grad_()
        out = layers(given)
        assert out.shape == (5, 8, 1, 1, 1)
        out.pow(3).sum().backward()
        grads.append((out, given.grad, *(weight.grad for weight in layers.parameters())))
    for left, right in zip(*grads, strict=True):
        assert torch.allclose(left, right, rtol=1e-10, atol=1e-10)


def test_what_sees_more_than_a_patch_stays_a_convolution() -> None:
    layers = nn.Sequential(nn.Conv3d(3, 8, (2, 7, 7), (2, 7, 7)), nn.Conv3d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 2))
    clip = torch.randn(1, 3, 4, 14, 14)
    before = layers[0](clip)
    replace_patch_projections(layers)
    assert [type(layer) for layer in layers] == [PatchProjection, nn.Conv3d, nn.Conv2d]
    assert before.shape == (1, 8, 2, 2, 2) and torch.allclose(layers[0](clip), before, atol=1e-6)


def test_models_have_it_and_save_what_they_did() -> None:
    reranker = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    for model in (UniME("unime-tiny", device="cpu"), reranker, load_cross_encoder("unime-tiny", template="tiny")):
        found = [name for name, module in model.named_modules() if isinstance(module, PatchProjection)]
        assert len(found) == 1 and f"{found[0]}.weight" in model.state_dict()
        # As a process of its own gets the model.
        copied = pickle.loads(pickle.dumps(model.get_submodule(found[0])))
        assert type(copied) is PatchProjection
