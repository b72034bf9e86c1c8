"""The miniature's own training: killed after any checkpoint, it goes on to the same bits."""

import pytest
import torch
from safetensors.torch import load_file

from miniature import train


@pytest.mark.slow
def test_a_killed_vae_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PICTURES", 24)
    narrow = train.VAE_CONFIG | {"block_out_channels": [16, 16, 16, 16]}
    monkeypatch.setattr(train, "VAE_CONFIG", narrow)
    results = []
    for killed in (False, True):
        monkeypatch.setattr(train, "WORK", tmp_path / str(killed))
        monkeypatch.setattr(train, "MODEL", tmp_path / str(killed) / "model")
        train.WORK.mkdir()
        pictures, _ = train.make_data()
        if killed:

            def save_and_die(self, step, save=train.Checkpoint.save):
                save(self, step)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train.Checkpoint, "save", save_and_die)
                train.train_vae(pictures, "cpu", first=3, crop=2, second=2, save_every=2)
            assert not (train.MODEL / "vae").exists()
        train.train_vae(pictures, "cpu", first=3, crop=2, second=2, save_every=2)
        results.append(load_file(train.MODEL / "vae" / "diffusion_pytorch_model.safetensors"))
    assert results[0] and all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_muon_moves_along_the_nearest_orthogonal_matrix():
    """With one gradient and no history the step is U V^T of the gradient's SVD, to Newton-Schulz's
    tolerance."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(24, 40))
    p.grad = torch.randn(24, 40)
    train.Muon([p], lr=1.0).step()
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    step, nearest = -p.detach().flatten(), (u @ v).flatten()
    assert torch.nn.functional.cosine_similarity(step, nearest, dim=0) > 0.97
    singular = torch.linalg.svdvals(p.detach())
    assert 0.6 < singular.min() and singular.max() < 1.3
