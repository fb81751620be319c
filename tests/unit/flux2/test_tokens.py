import torch

from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents, patchify, unpack_latents, unpatchify


def test_patchify_puts_channel_first_then_row_then_column():
    moments = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    latents = patchify(moments)
    assert latents.shape == (2, 12, 2, 3)
    for c in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(latents[:, c * 4 + row * 2 + column], moments[:, c, row::2, column::2])


def test_unpatchify_undoes_patchify():
    moments = torch.randn(2, 32, 6, 10)
    assert torch.equal(unpatchify(patchify(moments)), moments)


def test_pack_goes_row_after_row_and_back():
    latents = torch.randn(2, 128, 3, 5)
    tokens = pack_latents(latents)
    assert tokens.shape == (2, 15, 128)
    assert torch.equal(tokens[:, 1 * 5 + 2], latents[:, :, 1, 2])
    assert torch.equal(unpack_latents(tokens, 3, 5), latents)


def test_image_ids_follow_pack():
    assert image_ids(2, 3).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 2, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 2, 0],
    ]
    assert image_ids(2, 3).dtype == torch.int64


def test_context_ids_count_along_the_last_axis():
    assert context_ids(512)[[0, 1, 511]].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 511]]
