from dataclasses import replace

import pytest
import torch
from helpers import TINY, layout, tiny_model
from torch.distributed.utils import _to_kwargs

from common import attention as fast
from common.attention import Rows, Run, attention, attention_runs, queries
from common.devices import compile_blocks
from model import PADDING, Condition, Config, Transformer, attention_rule, patchify
from scale.cost import flops


def condition(layouts, h=8, w=8, seed=0):
    """Random text and images for rows such as "tt11t"; an image of h x w pixels is 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    L = max(map(len, layouts))
    kind = layout(*(row.rjust(L, ".") for row in layouts))
    ids = torch.randint(1, 80, kind.shape, generator=generator)
    images = torch.randn(sum(len(set(row) - {"t", "."}) for row in layouts), 3, h, w, generator=generator)
    return Condition(ids, kind, [images])


def rows_of(condition, b):
    """Row b alone, without its padding."""
    real = condition.kind[b] != PADDING
    before = sum(int(kind.max()) for kind in condition.kind[:b].clamp(min=0))
    return Condition(condition.ids[b:b + 1, real], condition.kind[b:b + 1, real],
                     [condition.images[0][before:before + int(condition.kind[b].clamp(min=0).max())]])


def test_attention_rule():
    allowed = attention_rule(layout(".t11t22"))[0]
    expected = torch.tensor([[1, 1, 1, 1, 1, 1, 1],       # padding: looks everywhere, is read by nobody
                             [0, 1, 0, 0, 0, 0, 0],
                             [0, 1, 1, 1, 0, 0, 0],       # image 1 sees itself whole, not what follows
                             [0, 1, 1, 1, 0, 0, 0],
                             [0, 1, 1, 1, 1, 0, 0],
                             [0, 1, 1, 1, 1, 1, 1],
                             [0, 1, 1, 1, 1, 1, 1]]).bool()
    assert allowed.equal(expected)


def test_the_time_token_is_text_and_the_target_one_more_image():
    """The sequence that forward attends over: the time token sees all but the target, the target sees everything."""
    kind = whole_sequence(condition(["tt1111t", "t"]), 4)
    allowed = attention_rule(kind)
    real = kind != PADDING
    assert allowed[:, 8:].equal(real[:, None].expand(-1, 4, -1))
    assert allowed[:, 7, :8].equal(real[:, :8]) and not allowed[:, 7, 8:].any()


def whole_sequence(c, N):
    """The kind (B, S) of condition, time and target that a Transformer hands to attention_runs."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.attention_runs", lambda kind, *rest: seen.append(kind))
        tiny_model().runs(c, N, "cpu")
    return seen[0]


@pytest.mark.parametrize("rows, runs", [(["tt1111t2222t"], 7), (["tt1111t2222t", "....tttt111t"], 7), (["..1t", "tttt"], 4)])
@pytest.mark.parametrize("long", [0, 1000])               # attention row by row, or with a dense mask where rows differ
def test_runs_equal_the_dense_rule_forward_and_backward(rows, runs, long, monkeypatch):
    monkeypatch.setattr(fast, "LONG", long)
    kind = whole_sequence(condition(rows), 4)
    B, S = kind.shape
    L = S - 5
    q, k, v, g = torch.randn(4, B, 2, S, 8).unbind(0)
    g = g * (kind != PADDING)[:, None, :, None]           # what padding looks at does not matter
    sparse = attention_runs(kind, L, "cpu", attention_rule)
    assert len(sparse[0].runs) == (2 if len(rows) > 1 and long else runs)
    results = []
    for way in (sparse, [Rows(slice(None), 0, [Run(0, S, S, attention_rule(kind)[:, None])])]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention(*leaves, way)
        y.backward(g)
        results.append([y * (g != 0), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    after = attention(q[:, :, L:], k, v, queries(sparse, L, S))          # as the last layer and denoise do
    torch.testing.assert_close(after, results[0][0][:, :, L:])


@pytest.mark.parametrize("long", [False, True])
def test_the_fused_kernel_equals_the_written_out_attention(long):
    keys = 300 if long else 30                            # above and below the length where attend_to changes
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    attend = torch.rand(2, 1, 5, keys) < 0.5
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~attend, -torch.inf)
    torch.testing.assert_close(attention(q, k, v, [Rows(slice(None), 0, [Run(0, 5, keys, attend)])]), scores.softmax(-1) @ v)


def test_who_sees_whom_in_the_whole_model():
    """Change one token, see which keys and values of the last layer, and which outputs, change."""
    model, c, x, t = tiny_model(), condition(["tt1111ttt"]), torch.randn(1, 3, 8, 8), torch.tensor([0.3])
    base = model.encode(c, 4).layers[-1][0][:, :, :9]      # 9 tokens of the condition
    ids = c.ids.clone()
    ids[0, 7] += 1
    text = (model.encode(replace(c, ids=ids), 4).layers[-1][0][:, :, :9] - base).abs().amax(dim=(0, 1, 3)) > 1e-6
    assert text.tolist() == [False] * 7 + [True] * 2                       # text: only itself and what follows
    image = c.images[0].clone()
    image[:, :, 4:, 4:] += 1                                               # its last patch
    seen = (model.encode(replace(c, images=[image]), 4).layers[-1][0][:, :, :9] - base).abs().amax(dim=(0, 1, 3)) > 1e-6
    assert seen.tolist() == [False] * 2 + [True] * 7                       # image: all of itself, and what follows
    changed = x.clone()
    changed[:, :, :4, :4] += 1
    moved = (model.denoise(changed, t, model.encode(c, 4)) - model.denoise(x, t, model.encode(c, 4))).abs()
    assert (patchify(moved, 4).amax(dim=2) > 1e-6).all()                   # target: every token sees every other


@pytest.mark.parametrize("rows", [["tt1111t"], ["tt1111t", "t"]])
def test_the_time_token_does_not_see_the_target(rows):
    model, c = tiny_model(), condition(rows)
    kept = []
    model.llm.layers[0].register_forward_hook(lambda m, inputs, output: kept.append(output[0]))
    cache = model.encode(c, 4)
    for x in (torch.randn(len(rows), 3, 8, 8), torch.randn(len(rows), 3, 8, 8)):
        model.denoise(x, torch.full((len(rows),), 0.5), cache)
    torch.testing.assert_close(kept[1][:, 0], kept[2][:, 0])
    assert not torch.allclose(kept[1][:, 1], kept[2][:, 1])


@pytest.mark.parametrize("long", [0, 1000])               # attention row by row, or with a dense mask
def test_a_ragged_batch_equals_its_rows_one_by_one(long, monkeypatch):
    monkeypatch.setattr(fast, "LONG", long)
    model = tiny_model()
    c = condition(["tt1111ttt", "t1111t2222t", "tt"])
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    together = model(x, t, c)
    for b in range(3):
        torch.testing.assert_close(together[b:b + 1], model(x[b:b + 1], t[b:b + 1], rows_of(c, b)), atol=1e-5, rtol=1e-5)


def test_encoding_once_equals_encoding_at_every_step():
    model, c, x = tiny_model(), condition(["tt1111ttt", "t"]), torch.randn(2, 3, 8, 8)
    cache = model.encode(c, 4)
    for k in range(5):                                     # from the first step on
        t = torch.full((2,), k / 5)
        v = model.denoise(x, t, cache)
        torch.testing.assert_close(v, model(x, t, c), atol=1e-6, rtol=1e-6)
        x = x + v / 5


def test_a_gap_moves_the_target_as_so_many_positions_and_no_gap_moves_nothing():
    model, c, x, t = tiny_model(), condition(["tt1111ttt", "tt"]), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    assert model(x, t, replace(c, gap=torch.zeros(2, dtype=torch.long))).equal(model(x, t, c))
    moved = replace(c, gap=torch.tensor([0, 5]))
    assert model.embed_condition(moved, 4)[2].tolist() == [[9, 10, 11, 12, 13], [7, 8, 9, 10, 11]]       # 9 tokens, 2 + 5
    out = model(x, t, moved)
    assert out[0].equal(model(x, t, c)[0]) and not torch.allclose(out[1], model(x, t, c)[1], atol=1e-4)
    torch.testing.assert_close(model.denoise(x, t, model.encode(moved, 4)), out, atol=1e-6, rtol=1e-6)
    assert moved.to("meta").gap.device.type == "meta"


def test_padding_content_does_not_matter():
    model, c, x, t = tiny_model(), condition(["tt1111ttt", "tt"]), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    other = replace(c, ids=torch.where(c.kind == PADDING, 7, c.ids))
    torch.testing.assert_close(model(x, t, c), model(x, t, other), atol=0, rtol=0)


def test_the_content_of_a_masked_token_does_not_matter():
    model, c, x, t = tiny_model(), condition(["tt1111"]), torch.randn(1, 3, 8, 8), torch.tensor([0.2])
    masked, token = torch.tensor([[False, True, False, False]]), torch.randn(1, 32)
    other = x.clone()
    other[:, :, :4, 4:] = 9.0                              # token 1: rows 0-3, columns 4-7
    torch.testing.assert_close(model(x, t, c, masked, token), model(other, t, c, masked, token), atol=0, rtol=0)
    assert not torch.allclose(model(x, t, c), model(other, t, c))
    moved = model(x, t, c, masked, token) - model(x, t, c, masked.roll(1), token)
    assert moved.abs().max() > 1e-3                        # which token it is does: its position stays


def test_patchify_then_unpatchify_is_the_identity():
    model = tiny_model(layers=1)
    x = torch.randn(2, 3, 8, 12)
    # the output order (row, column, channel) of the final layer, against the order (channel, row, column) of patchify
    tokens = patchify(x, 4).unflatten(2, (3, 4, 4)).permute(0, 1, 3, 4, 2).flatten(2)
    model.final_layer.forward = lambda hidden, time: tokens
    assert model.denoise(x, torch.zeros(2), model.encode(condition(["t", "t"]), 6)).equal(x)
    conv = torch.nn.functional.conv2d(x, model.x_embedder.proj.weight, model.x_embedder.proj.bias, stride=4)
    torch.testing.assert_close(model.x_embedder(patchify(x, 4)), conv.flatten(2).transpose(1, 2))


def test_gradients_reach_every_parameter():
    model = tiny_model().train()
    model(torch.randn(1, 3, 8, 8), torch.tensor([0.3]), condition(["tt1111tt"])).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_sharding_leaves_a_condition_where_it_is():
    """FSDP2 calls this on a GPU, with whatever a forward is given; `kind` has to stay on the CPU."""
    c = condition(["tt1111t"])
    _, moved, alone = _to_kwargs((torch.ones(1), c, (c.kind,)), {}, torch.device("meta"), False)[0][0]
    assert moved.kind.device.type == "cpu" and alone[0].device.type == "meta"


def test_recomputing_blocks_changes_nothing_but_how_often_they_run():
    model, c, x, t = tiny_model().train(), condition(["tt1111tt", "t"]), torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    grads, calls = [], []
    for block in model.llm.layers:
        block.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    for model.checkpointing in (0, 1, 2):                # of its two blocks
        model.zero_grad()
        calls.clear()
        model(x, t, c).square().mean().backward()
        assert len(calls) == 2 + model.checkpointing
        grads.append([p.grad for p in model.parameters()])
    for plain, *recomputed in zip(*grads):
        for grad in recomputed:
            torch.testing.assert_close(grad, plain)


def test_a_fresh_model_predicts_zero():
    model = Transformer(Config(**TINY, vocab=80)).init_weights()
    assert model(torch.randn(1, 3, 8, 8), torch.tensor([0.3]), condition(["tt1111"])).abs().max() == 0


def test_flops_against_torch_counting_them():
    from torch.utils.flop_counter import FlopCounterMode
    model, c = tiny_model(), condition(["tttttttt"])
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 16, 16), torch.tensor([0.3]), c)
    L, N, D = 8, 16, 32
    time_mlps = 2 * (2 * 256 * D + 2 * D * D) + 2 * D * 2 * D                             # left out of flops(): once a sample
    dense = 4 * D * (L * L - L * (L + 1) // 2)                                            # the half that text does not look at
    assert counter.get_total_flops() - time_mlps - dense == flops(model.cfg, c.kind[0], N)


@pytest.mark.slow
def test_compiled_equals_eager():
    """Forward, gradients and two steps of sampling, on a ragged batch."""
    def results(model):
        x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0.2, 0.7])
        model.zero_grad()
        output = model(x, t, condition(["tt1111ttt", "tttt"]))
        output.square().mean().backward()
        cache = model.encode(condition(["tt1111ttt", "tttt"]), 16)
        gradients = [p.grad.clone() for p in model.parameters()]
        return [output.detach(), model.denoise(x, t, cache), model.denoise(2 * x, t, cache), *gradients]
    model = tiny_model()
    eager = results(model)
    compile_blocks(model)
    for a, b in zip(results(model), eager):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
