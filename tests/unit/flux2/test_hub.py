"""Downloads from a Hub on this machine that is cut off, refuses, damages, redirects or says nothing."""

import threading
import time

import pytest
from huggingface_hub import constants
from tests.loopback_hub import linked_copy, loopback_hub, sha256

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.base.machine import free_disk_bytes
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2 import model_locations
from simpletuner.flux2.model_locations import Hub, fetch, missing_download

SECRET = "hf_thisIsNobodysToken"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def options(tmp_path):
    return ModelOptions(model_flavour="tiny", cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def start(hub, options, monkeypatch):
    """What a start asks of acme/flux2, or of another repository: files by name. Returns their paths, and the lines."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # written 10 MiB at a time, these files are one piece

    def start(*names, repo="acme/flux2", environ=None, options=options):
        lines = []
        place = Hub(repo, options, lines.append, environ or {"HF_ENDPOINT": hub.url})
        fetch([(place, name) for name in names], lines.append)
        return [place.path(name) for name in names], lines

    return start


def partial(options):
    (left,) = model_locations.hub_cache(options).rglob("*.incomplete")
    return left


def test_a_download_that_was_cut_off_goes_on_at_the_next_start(hub, start, options, repository):
    hub.reset = {VAE}
    with pytest.raises(AccessError, match=r"cannot reach the Hub .*reset.* downloaded data is kept"):
        start(VAE)
    kept, whole = partial(options).stat().st_size, (repository / VAE).stat().st_size
    assert 0 < kept < whole
    (path,), (line,) = start(VAE)
    assert [request.first_byte for request in hub.requests if request.method == "GET"] == [0, kept]
    assert hub.bytes_sent[VAE] <= whole + whole // 2 - kept
    assert path.read_bytes() == (repository / VAE).read_bytes()
    assert line.startswith(f"To download from acme/flux2: {(whole - kept) / 2**20:.1f} MiB in 1 file, to "), line
    assert not list(model_locations.hub_cache(options).rglob("*.incomplete"))


def test_a_second_start_asks_for_the_listing_alone(hub, start):
    start(VAE, "vae/config.json")
    hub.forget()
    _, lines = start(VAE, "vae/config.json")
    assert lines == []
    assert hub.requests == []
    assert hub.listings == {"acme/flux2": 1}


def test_only_the_rest_of_a_download_needs_room(hub, start, options, repository):
    hub.reset = {VAE}
    with pytest.raises(AccessError):
        start(VAE)
    place = Hub("acme/flux2", options, print, {"HF_ENDPOINT": hub.url})
    assert place.absent([VAE]) == {VAE: (repository / VAE).stat().st_size - partial(options).stat().st_size}


def test_what_the_hub_offers_over_xet_too_is_resumed_where_xet_is_off(hub, start, repository, monkeypatch):
    hub.offers_xet, hub.reset = True, {VAE}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with pytest.raises(AccessError, match="downloaded data is kept"):
        start(VAE)
    (path,), _ = start(VAE)
    assert hub.requests[-2].first_byte > 0
    assert path.read_bytes() == (repository / VAE).read_bytes()


def test_damaged_bytes_are_noticed_and_downloaded_anew(hub, start, repository):
    hub.damaged = {VAE}
    with pytest.raises(AccessError, match=rf"{VAE} of acme/flux2 arrived damaged: .* Run the command again"):
        start(VAE)
    hub.damaged.clear()
    (path,), _ = start(VAE)
    assert sha256(path) == sha256(repository / VAE)


@pytest.mark.parametrize("name", [VAE, "vae/config.json"])
def test_another_number_of_bytes_than_announced_is_noticed(hub, start, repository, name):
    hub.longer = {name}
    with pytest.raises(AccessError, match=r"a download from acme/flux2 was interrupted\. Run the command again"):
        start(name)
    hub.longer.clear()
    (path,), _ = start(name)
    assert path.read_bytes() == (repository / name).read_bytes()


def test_a_longer_partial_file_than_the_whole_is_replaced(hub, start, options, repository):
    hub.reset = {VAE}
    with pytest.raises(AccessError):
        start(VAE)
    partial(options).write_bytes(bytes((repository / VAE).stat().st_size + 1))
    (path,), _ = start(VAE)
    assert path.read_bytes() == (repository / VAE).read_bytes()


def test_what_a_killed_download_of_huggingface_hub_left_is_removed(start, options, repository):
    left = (
        model_locations.hub_cache(options) / f"models--acme--flux2/blobs/{sha256(repository / VAE)}.0123abcd.incomplete"
    )
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    start(VAE)
    assert not left.exists()


def test_a_new_commit_downloads_only_what_changed(hub, start, repository):
    start(VAE, "vae/config.json")
    hub.commit = "f" * 40
    (repository / "vae/config.json").unlink()
    (repository / "vae/config.json").write_text("{}")
    hub.forget()
    paths, (line,) = start(VAE, "vae/config.json")
    assert hub.downloads() == ["vae/config.json"]
    assert "in 1 file," in line
    assert paths[1].read_text() == "{}"


def test_an_older_commit_that_is_whole_serves_until_the_new_one_is(hub, start, repository):
    (before,), _ = start(VAE)
    hub.commit = "f" * 40
    (repository / VAE).unlink()
    (repository / VAE).write_bytes(b"another file of the same name")
    hub.refusal = (403, "")
    with pytest.raises(AccessError):
        start(VAE)
    hub.absence = (503, "")
    (path,), (line,) = start(VAE)
    assert path == before
    assert line == "The Hub answers HTTP 503 for acme/flux2: using the earlier download."


def test_a_token_goes_to_the_hub_and_not_to_its_cdn(hub, start, repository, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with loopback_hub({"acme/flux2": repository}, "127.0.0.2") as cdn:
        hub.cdn = cdn
        (path, _), _ = start(VAE, "vae/config.json")
        assert cdn.downloads() == [VAE]
        assert set(cdn.tokens) == {None}
    assert set(hub.tokens) == {f"Bearer {SECRET}"}
    assert path.read_bytes() == (repository / VAE).read_bytes()


@pytest.mark.parametrize("flavour", [flavour for flavour in FLAVOURS.values() if flavour.license_notice is not None])
@pytest.mark.parametrize(("status", "token"), [(401, None), (403, SECRET)])
def test_a_gated_model_names_its_license_and_its_page(hub, start, repository, monkeypatch, flavour, status, token):
    hub.repositories[flavour.repo] = repository
    hub.refusal = (status, "GatedRepo")
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(AccessError) as caught:
        start(VAE, repo=flavour.repo)
    license_name, page = flavour.license.split(", ")
    assert f"Accept its license ({license_name}) on https://huggingface.co/{flavour.repo}" in str(caught.value)
    assert page.endswith(flavour.repo)
    assert ("hf auth login" in str(caught.value)) == (token is None)
    assert SECRET not in str(caught.value)


def test_a_refusal_without_a_reason_asks_for_a_login(hub, start, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.refusal = (403, "")
    for name in (VAE, "vae/config.json"):
        with pytest.raises(AccessError, match=r"the Hub requires a login for acme/flux2 \(HTTP 403\)\. Log in with"):
            start(name)


def test_a_repository_that_is_not_there(start):
    with pytest.raises(AccessError, match="acme/flux3 is neither a local folder nor a Hub repository"):
        start(VAE, repo="acme/flux3")
    with pytest.raises(AccessError, match="acme/flux--3 is not a Hub id"):
        start(VAE, repo="acme/flux--3")


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_overloaded_says_so(hub, start, status):
    hub.absence = (status, "")
    with pytest.raises(AccessError, match=rf"the Hub answers HTTP {status} for acme/flux2\. Try again later"):
        start(VAE)


def test_a_hub_that_says_nothing_is_given_up(hub, start, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)  # what HF_HUB_ETAG_TIMEOUT sets, which is 10 s
    hub.is_silent = True
    begun = time.monotonic()
    with pytest.raises(AccessError, match=r"cannot reach the Hub for acme/flux2 \(timed out\)"):
        start(VAE)
    assert time.monotonic() - begun < 1


def test_a_login_page_is_told_from_the_hub(hub, start):
    hub.is_login_page = True
    with pytest.raises(AccessError, match=rf"{hub.url} does not answer like the Hub .* a proxy or a login page"):
        start(VAE)


def test_a_proxy_that_is_not_there_is_named(start, monkeypatch):
    from huggingface_hub.utils import close_session

    monkeypatch.setenv("HTTP_PROXY", "http://somebody:secret@127.0.0.1:9")
    close_session()
    with pytest.raises(AccessError, match=r"cannot reach the Hub for acme/flux2 .* run the command again") as caught:
        start(VAE, environ={"HF_ENDPOINT": "http://hub.invalid"})
    close_session()
    assert "secret" not in str(caught.value)


def test_offline_asks_nobody_and_says_so(hub, start, monkeypatch):
    (before,), _ = start(VAE)
    hub.tokens.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (path,), (line,) = start(VAE)
    assert path == before
    assert line == "HF_HUB_OFFLINE forbids access to the Hub for acme/flux2: using the earlier download."
    with pytest.raises(AccessError, match=r"HF_HUB_OFFLINE forbids access to the Hub for acme/flux3\. Unset it"):
        start(VAE, repo="acme/flux3")
    assert hub.tokens == []


def test_a_full_disk_refuses_before_a_byte_of_weights(hub, start, options):
    hub.size_shown = free_disk_bytes(model_locations.hub_cache(options)) + 2**30
    with pytest.raises(DiskError, match=r"to download and .* free in .*cache\. Free some space, or .* --cache_dir"):
        start(VAE, "vae/config.json")
    assert hub.requests == []
    assert DiskError.exit_code == 7


def test_two_starts_at_once_download_once(hub, start):
    found = []
    threads = [threading.Thread(target=lambda: found.append(start(TRANSFORMER)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert hub.downloads() == [TRANSFORMER]


def test_the_plan_counts_what_an_interrupted_start_has(hub, options, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    dev = ModelOptions(model_flavour="dev", cache_dir=options.cache_dir)
    repo = FLAVOURS["dev"].repo
    hub.repositories[repo] = linked_copy(tiny_folder, tmp_path / "dev")
    before = missing_download(dev)
    place = Hub(repo, dev, print, {"HF_ENDPOINT": hub.url})
    path = place.path(VAE)
    assert missing_download(dev) == before - path.stat().st_size
    place.keep_commit()
    assert missing_download(dev) == before - path.stat().st_size
