import numpy as np
import torch

from speech_adapter.ctc import EmbeddingCTC, PhonemeHead, token_codes


def test_a_vector_on_an_embedding_is_read_as_that_token() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 16)
    ctc = EmbeddingCTC(table)
    blank = ctc.blank.detach()
    frames = torch.stack([table[7], table[7], blank, table[7], table[3], blank])[None]
    assert ctc.decode(frames, torch.tensor([6])) == [[7, 7, 3]]
    assert ctc.decode(frames, torch.tensor([2])) == [[7]]


def test_merging_joins_what_says_the_same_and_drops_blanks() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 16)
    ctc = EmbeddingCTC(table)
    near = table[7] + 0.1
    blank = ctc.blank.detach()
    frames = torch.stack([blank, table[7], near, blank, table[7], table[3]])[None].requires_grad_()
    (merged,) = ctc.merge(frames, torch.tensor([5]))
    torch.testing.assert_close(merged, torch.stack([table[7] + 0.05, table[7]]))
    # What they stand for lies closest to token 7 too.
    assert torch.cdist(ctc.denoise(merged), table).argmin(dim=-1).tolist() == [7, 7]
    merged.sum().backward()
    assert frames.grad is not None
    assert frames.grad[0].any(dim=-1).tolist() == [False, True, True, False, True, False]
    (nothing,) = ctc.merge(blank.expand(1, 3, -1), torch.tensor([3]))
    assert nothing.shape == (0, 16)


def test_a_doubtful_vector_becomes_the_posterior_mean() -> None:
    torch.manual_seed(1)
    table = torch.randn(50, 16)
    ctc = EmbeddingCTC(table)
    between = ((table[3] + table[9]) / 2)[None]
    distance = (between.double() - table.double()).square().sum(-1)
    weights = (-ctc.sharpness * 0.5 * distance).softmax(-1)
    torch.testing.assert_close(
        ctc.denoise(between)[0].double(), weights @ table.double(), atol=1e-4, rtol=1e-4
    )
    assert sorted(weights.topk(2).indices.tolist()) == [3, 9]


def test_it_reads_in_bf16_too() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 16)
    expected = EmbeddingCTC(table).denoise(table[[3, 9]])
    read = EmbeddingCTC(table).to(torch.bfloat16).denoise(table[[3, 9]].bfloat16())
    assert read.dtype == torch.bfloat16
    torch.testing.assert_close(read.float(), expected, atol=0.1, rtol=0.02)


def test_loss_is_small_for_the_right_text_and_large_for_another() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 16)
    ctc = EmbeddingCTC(table)
    frames = torch.stack([table[7], ctc.blank.detach(), table[3]])[None]
    right = ctc.loss(frames, torch.tensor([3]), [[7, 3]])
    assert right < 0.5 < 2 < ctc.loss(frames, torch.tensor([3]), [[3, 7]])


def test_loss_ignores_padding() -> None:
    torch.manual_seed(0)
    ctc = EmbeddingCTC(torch.randn(20, 8))
    frames = torch.randn(2, 9, 8)
    lengths, targets = torch.tensor([9, 5]), [[1, 2, 3], [4]]
    changed = frames.clone()
    changed[1, 5:] = 100.0
    torch.testing.assert_close(ctc.loss(frames, lengths, targets), ctc.loss(changed, lengths, targets))


def test_the_gradient_pulls_outputs_towards_the_embedding() -> None:
    torch.manual_seed(0)
    table = torch.randn(30, 8)
    ctc = EmbeddingCTC(table)
    frames = torch.zeros(1, 4, 8, requires_grad=True)
    before = None
    for _ in range(60):
        ctc.loss(frames, torch.tensor([4]), [[5, 9]]).backward()
        assert frames.grad is not None
        with torch.no_grad():
            frames -= 0.1 * frames.grad
            frames.grad = None
        nearest = torch.cdist(frames.detach()[0], table[[5, 9]]).min(dim=0).values.sum()
        before = nearest if before is None else before
    assert nearest < 0.5 * before
    assert ctc.decode(frames.detach(), torch.tensor([4])) == [[5, 9]]


def test_phoneme_labels_follow_the_clock() -> None:
    head = PhonemeHead(4, ["_", "a", "b"])
    labels = head.labels(np.array([0.0, 0.08]), np.array(["a", "b"]), n_frames=6, offset=0.04)
    assert labels == [0, 1, 1, 2, 2, 2]


def test_clips_without_labels_cost_nothing() -> None:
    torch.manual_seed(0)
    head = PhonemeHead(4, ["_", "a"])
    hidden = torch.randn(2, 3, 4)
    both = head.loss(hidden, [[0, 1, 1], None])
    torch.testing.assert_close(both, head.loss(hidden[:1], [[0, 1, 1]]))
    assert head.loss(hidden, [None, None]) == 0


def test_codes_are_heard_and_embeddings_are_read() -> None:
    embeddings = torch.randn(40, 128) * 0.2
    coded = EmbeddingCTC(embeddings, codes=3)
    assert torch.equal(coded.table, token_codes(40, 128, 3)) and not torch.equal(coded.table, embeddings)
    heard = coded.table[[5, 5, 9]]
    assert coded.decode(heard[None], torch.tensor([3])) == [[5, 9]]
    (merged,) = coded.merge(heard[None], torch.tensor([3]))
    torch.testing.assert_close(coded.denoise(merged), embeddings[[5, 9]], atol=1e-3, rtol=0)
    assert not coded.state_dict().keys() & {"codes", "embeddings"}


def test_the_codes_are_those_that_saved_adapters_were_trained_with() -> None:
    # The bundled weights mean nothing beside others: a torch that draws other numbers has to be seen.
    codes = token_codes(4096, 192, 0)
    torch.testing.assert_close(codes[0, :3], torch.tensor([-1.12584, -1.15236, -0.25058]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        codes[-1, -3:], torch.tensor([-0.81243, -0.29993, -0.55060]), atol=1e-5, rtol=0
    )
