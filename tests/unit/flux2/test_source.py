import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.file_faults import rights_of_a_user

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.source import locate
from simpletuner.flux2.tiny.klein import KLEIN_TEXT_CONFIG
from simpletuner.flux2.tiny.make import VERSION

SECRET = "hf_thisIsNobodysToken"
WEIGHTS = [
    "text_encoder/model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def options(**given):
    return ModelOptions(model_flavour="tiny", **given)


@pytest.fixture
def ask(hub, tmp_path):
    """Locates the repository of the loopback Hub; returns the source and what was reported."""

    def ask(environ=None, **given):
        reports = []
        given = {"pretrained_model_name_or_path": "acme/flux2", "cache_dir": str(tmp_path / "cache"), **given}
        source = locate(options(**given), report=reports.append, environ=environ or {"HF_ENDPOINT": hub.url})
        return source, reports

    return ask


def split_text_encoder(folder: Path) -> None:
    """Two shards and an index: the second has nothing that embedding text needs."""
    whole = folder / "text_encoder/model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    late = ("layers.30.", "layers.31.", "lm_head", "vision_tower", "multi_modal_projector", "model.norm")
    index = {name: f"model-0000{1 + any(part in name for part in late)}-of-00002.safetensors" for name in tensors}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == shard}, whole.with_name(shard))
    whole.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


# --- local folders and files


def test_a_local_folder_needs_no_network(tiny_folder):
    source = locate(options(pretrained_model_name_or_path=str(tiny_folder)), report=pytest.fail, environ=NOBODY)
    assert source.transformer.files == (tiny_folder / WEIGHTS[1],)
    assert source.vae.files == (tiny_folder / WEIGHTS[2],)
    assert source.text_encoder.files == (tiny_folder / WEIGHTS[0],)
    assert source.tokenizer == tiny_folder / "tokenizer"
    assert source.text_layers == (10, 20, 30)
    assert source.name == tiny_folder.name
    assert source.commit is None


def test_the_embedded_model_is_made_where_it_was_asked_for(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / f"tiny-{VERSION}")
    source = locate(options(cache_dir=str(tmp_path)), report=pytest.fail, environ=NOBODY)
    assert source.vae.files == (tmp_path / f"tiny-{VERSION}" / WEIGHTS[2],)


def test_everything_that_is_missing_is_named_at_once(repository):
    (repository / "vae/config.json").unlink()
    (repository / WEIGHTS[1]).unlink()
    (repository / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(AccessError) as caught:
        locate(options(pretrained_model_name_or_path=str(repository)), report=print)
    (problem,) = caught.value.problems
    for name in ("vae/config.json", WEIGHTS[1], "tokenizer/tokenizer.json"):
        assert name in problem.found
    assert "text_encoder" not in problem.found


def test_a_shard_that_is_not_there_is_named(repository):
    split_text_encoder(repository)
    (repository / "text_encoder/model-00001-of-00002.safetensors").unlink()
    with pytest.raises(AccessError, match="model-00001-of-00002"):
        locate(options(pretrained_model_name_or_path=str(repository)), report=print)


def test_half_a_file_is_found_before_anything_is_loaded(repository):
    whole = repository / WEIGHTS[0]
    size = whole.stat().st_size
    half = whole.read_bytes()[: size // 2]
    whole.unlink()
    whole.write_bytes(half)
    with pytest.raises(
        AccessError, match=rf"model\.safetensors is {size // 2:,} bytes long, {size:,} by its own header"
    ):
        locate(options(pretrained_model_name_or_path=str(repository)), report=print)


def test_another_model_is_told_apart(repository):
    config = repository / "transformer/config.json"
    config.unlink()
    config.write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(AccessError, match="its transformer is a FluxTransformer2DModel: expected a Flux2Tr"):
        locate(options(pretrained_model_name_or_path=str(repository)), report=print)


@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
def test_a_folder_that_does_not_exist(key, tiny_folder):
    given = {"pretrained_model_name_or_path": str(tiny_folder), key: "/no/such/folder"}
    with pytest.raises(AccessError, match="/no/such/folder: no such folder"):
        locate(options(**given), report=print)


def test_one_component_may_come_from_elsewhere(tiny_folder, repository):
    base = {"pretrained_model_name_or_path": str(tiny_folder)}
    for path in (repository, repository / "vae"):
        source = locate(options(**base, pretrained_vae_model_name_or_path=str(path)), report=print)
        assert source.vae.files == (repository / WEIGHTS[2],)
        assert source.transformer.files == (tiny_folder / WEIGHTS[1],)
    for path in (repository, repository / "text_encoder"):
        source = locate(options(**base, pretrained_text_encoder_model_name_or_path=str(path)), report=print)
        assert source.text_encoder.files == (repository / WEIGHTS[0],)
    assert source.tokenizer == tiny_folder / "tokenizer", "text_encoder/ alone has none"


@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path"])
def test_a_single_file_is_the_transformer(key, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / f"tiny-{VERSION}")
    file = tmp_path / "flux2.safetensors"
    file.hardlink_to(tiny_folder / WEIGHTS[1])
    source = locate(options(cache_dir=str(tmp_path), **{key: str(file)}), report=pytest.fail, environ=NOBODY)
    assert source.transformer.files == (file,)
    assert source.transformer.config is None
    assert source.vae.files == (tmp_path / f"tiny-{VERSION}" / WEIGHTS[2],)
    assert source.name == "flux2.safetensors"
    with pytest.raises(AccessError, match="no such file"):
        locate(options(**{key: "absent.safetensors"}), report=print)


@pytest.mark.parametrize("name", ["vae", "vae/config.json", WEIGHTS[1], "tokenizer/tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(name, repository):
    asked = options(pretrained_model_name_or_path=str(repository))
    path = repository / name
    kept = path.rename(path.with_name("kept"))  # other tests have the same file
    shutil.copytree(kept, path) if kept.is_dir() else shutil.copyfile(kept, path)
    path.chmod(0)
    with (
        rights_of_a_user(),
        pytest.raises(AccessError, match=rf"cannot read .*/{name}.*: Permission denied\. Give the"),
    ):
        locate(asked, report=print)
    path.chmod(0o700)


def test_parts_that_do_not_belong_together(tiny_folder):
    with pytest.raises(AccessError, match="2 text-encoder layers of width 64: expected 192 in total"):
        locate(
            options(pretrained_model_name_or_path=str(tiny_folder), custom_text_encoder_intermediary_layers=(10, 20)),
            report=print,
        )


def test_kleins_text_encoder_is_told_apart(repository):
    config = repository / "text_encoder/config.json"
    config.unlink()
    config.write_text(json.dumps(KLEIN_TEXT_CONFIG))
    with pytest.raises(AccessError, match=r"its text encoder has the shapes of tiny-klein: .* tiny-klein\.$"):
        locate(options(pretrained_model_name_or_path=str(repository)), report=print)


# --- fingerprints


def test_fingerprints_name_the_content_and_not_the_place(tiny_source, repository):
    moved = locate(options(pretrained_model_name_or_path=str(repository)), report=print)
    for component in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert moved.fingerprint(component) == tiny_source.fingerprint(component)


def test_fingerprints_see_a_changed_weight(tiny_source, repository):
    file = repository / WEIGHTS[2]
    tensors = load_file(file)
    tensors["bn.running_mean"][5] += 1e-3
    file.unlink()
    save_file(tensors, file)
    changed = locate(options(pretrained_model_name_or_path=str(repository)), report=print)
    assert changed.fingerprint("vae") != tiny_source.fingerprint("vae")
    assert changed.fingerprint("transformer") == tiny_source.fingerprint("transformer")


def test_whole_fingerprints_see_a_weight_wherever_it_changes(tiny_source, repository):
    file = repository / WEIGHTS[1]
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn.to_q.weight"].view(-1)[20_000:24_000] += 1
    file.unlink()
    save_file(tensors, file)
    changed = locate(options(pretrained_model_name_or_path=str(repository)), report=print)
    assert changed.fingerprint("transformer") == tiny_source.fingerprint("transformer"), "only heads are read"
    assert changed.fingerprint("transformer", all_bytes=True) != tiny_source.fingerprint("transformer", all_bytes=True)
    for component in ("vae", "text_encoder", "tokenizer"):
        assert changed.fingerprint(component, all_bytes=True) == tiny_source.fingerprint(component, all_bytes=True)


def test_unused_shards_change_no_fingerprint(tiny_source, repository):
    split_text_encoder(repository)
    split = locate(options(pretrained_model_name_or_path=str(repository)), report=print)
    assert [file.name for file in split.text_encoder.files] == ["model-00001-of-00002.safetensors"]
    for whole in (False, True):
        found = split.fingerprint("text_encoder", all_bytes=whole)
        assert found == tiny_source.fingerprint("text_encoder", all_bytes=whole)


# --- the Hub


def test_only_what_is_needed_is_downloaded_and_only_once(hub, ask, tiny_source):
    split_text_encoder(hub.repositories["acme/flux2"])
    (hub.repositories["acme/flux2"] / "flux2-dev.safetensors").write_bytes(b"64 GB that nobody needs")
    source, reports = ask()
    assert len(reports) == 1
    assert reports[0].startswith("To download from acme/flux2: ")
    assert "free)" in reports[0]
    downloads = hub.downloads()
    assert len(downloads) == len(set(downloads))
    assert "flux2-dev.safetensors" not in downloads
    assert "text_encoder/model-00002-of-00002.safetensors" not in downloads
    assert source.fingerprint("text_encoder") == tiny_source.fingerprint("text_encoder")
    assert source.name == "acme/flux2"
    assert source.commit is not None

    again, reports = ask()
    assert again == source
    assert reports == []
    assert hub.downloads() == downloads


def test_what_was_downloaded_serves_without_a_network(ask):
    source, _ = ask()
    offline, reports = ask(environ=NOBODY)
    assert offline.transformer.files == source.transformer.files
    assert offline.commit == source.commit
    (report,) = reports
    assert re.fullmatch(r"Cannot reach the Hub for acme/flux2 \(.*\): using the earlier download\.", report)


def test_no_network_and_nothing_downloaded(ask):
    with pytest.raises(AccessError, match=r"cannot reach the Hub for acme/flux2.* local folder"):
        ask(environ=NOBODY)


def test_gated_and_not_logged_in(hub, ask, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.refusal = (401, "GatedRepo")
    with pytest.raises(AccessError, match="gated and you are not logged in") as caught:
        ask()
    assert len(caught.value.problems) == 1, "not once for each component"
    assert "hf auth login" in str(caught.value)
    assert "https://huggingface.co/acme/flux2" in str(caught.value)
    assert hub.downloads() == []


def test_gated_and_no_access(hub, ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.refusal = (403, "GatedRepo")
    with pytest.raises(AccessError, match="your account has no access") as caught:
        ask()
    assert hub.tokens[-1] == f"Bearer {SECRET}"
    assert SECRET not in str(caught.value) + str(caught.value.__cause__)


def test_a_token_that_is_refused(hub, ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.absence = (403, "")
    with pytest.raises(AccessError, match=r"refuses your token.*hf auth login") as caught:
        ask()
    assert SECRET not in str(caught.value) + str(caught.value.__cause__)


def test_no_such_repository(hub, ask):
    hub.absence = (404, "RepoNotFound")
    with pytest.raises(AccessError, match="neither a local folder nor a Hub repository"):
        ask()


def test_no_such_revision(ask):
    with pytest.raises(AccessError, match="revision = nowhere: acme/flux2 has no such"):
        ask(revision="nowhere")


def test_a_repository_that_is_no_diffusers_folder(hub, ask):
    shutil.rmtree(hub.repositories["acme/flux2"] / "transformer")
    with pytest.raises(AccessError, match=r"acme/flux2 lacks transformer/config\.json"):
        ask()


def test_a_download_that_breaks_off_is_resumed(hub, ask):
    hub.broken[WEIGHTS[2]] = 1
    source, _ = ask()
    assert hub.downloads().count(WEIGHTS[2]) == 2
    assert source.vae.files[0].read_bytes() == (hub.repositories["acme/flux2"] / WEIGHTS[2]).read_bytes()


def test_after_a_failure_only_the_rest_is_downloaded(hub, ask):
    hub.failing.add(WEIGHTS[2])
    with pytest.raises(AccessError, match="HTTP 500"):
        ask()
    hub.failing.clear()
    before = set(hub.downloads()) - {WEIGHTS[2]}
    hub.forget()
    ask()
    assert before.isdisjoint(hub.downloads())
    assert WEIGHTS[2] in hub.downloads()


def test_a_disk_that_is_too_small_is_noticed_before_the_download(hub, ask):
    hub.size_shown = 10**18
    with pytest.raises(DiskError, match=r"to download and .* free"):
        ask()
    assert not set(WEIGHTS) & set(hub.downloads())


def test_variants(hub, ask):
    vae = hub.repositories["acme/flux2"] / WEIGHTS[2]
    vae.rename(vae.with_suffix(".bf16.safetensors"))
    source, reports = ask(variant="bf16")
    assert source.vae.files[0].name == "diffusion_pytorch_model.bf16.safetensors"
    assert source.transformer.files[0].name == "diffusion_pytorch_model.safetensors"
    assert reports[0] == "No bf16 variant of transformer, text_encoder: using files without a variant."


def test_a_variant_that_no_component_has(ask):
    with pytest.raises(AccessError, match="variant = bf61: no component has files of this variant"):
        ask(variant="bf61")
