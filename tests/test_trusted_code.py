"""Check that a file of settings never lets code of a checkpoint run: the user asks for it by name, each time."""

from __future__ import annotations

import json

import pytest
import yaml

import iisan_fast
from iisan_fast.config import RunConfig, UncachedConfig, ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.setting_fields import to_dict
from iisan_fast.setting_sources import base_settings
from iisan_fast.settings import extraction_config, run_config, take_views

REFUSED = "trust_remote_code: the settings ask to run code that comes with e .*a file cannot decide that"
ENCODERS = [{"source": "title", "encoder": "e", "trust_remote_code": True}]


@pytest.fixture
def recipe(tmp_path):
    """Return the settings of a file whose encoder asks for its own code."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": "d", "encoders": ENCODERS}))
    return base_settings(path)


def test_a_recipe_cannot_ask_for_code_at_extraction(recipe):
    paths = {"cache": "c"}
    with pytest.raises(InputError, match=REFUSED):
        extraction_config(paths, recipe)
    (view,) = extraction_config({**paths, "trust_remote_code": True}, recipe).views
    assert view.trust_remote_code
    (view,) = extraction_config(paths, recipe, changes={"encoders.title.trust_remote_code": True}).views
    assert view.trust_remote_code
    (view,) = extraction_config({**paths, "text_encoder": "other"}, recipe).views
    assert not view.trust_remote_code


def test_a_recipe_cannot_ask_for_code_in_training(recipe):
    with pytest.raises(InputError, match=REFUSED):
        run_config({"method": "lora"}, recipe)
    run = run_config({"method": "lora", "trust_remote_code": True}, recipe)
    assert [view.trust_remote_code for view in run.uncached.views] == [True]
    with pytest.raises(InputError, match=REFUSED):  # a run's config.json, as --config takes it
        run_config({}, to_dict(run))
    assert run_config({"trust_remote_code": True}, to_dict(run)) == run
    recipe["encoders"][0]["trust_remote_code"] = False
    run = run_config({"method": "lora", "trust_remote_code": True}, recipe)
    assert [view.trust_remote_code for view in run.uncached.views] == [True]


def test_a_run_that_needs_code_asks_again(tmp_path):
    view = ViewConfig("title", "title", "e", trust_remote_code=True)
    run = RunConfig("d", uncached=UncachedConfig((view,)))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    with pytest.raises(InputError, match=REFUSED):
        iisan_fast.resume(tmp_path)
    with pytest.raises(InputError) as error:
        iisan_fast.resume(tmp_path, trust_remote_code=True)
    assert "trust_remote_code" not in str(error.value)


def test_one_setting_is_for_all_encoders_of_a_command():
    settings = {"image_encoder": "i", "text_encoder": "t", "trust_remote_code": True}
    views = take_views(settings, [ViewConfig("more", "title", "m")])
    assert [view.trust_remote_code for view in views] == [True, True, True]
    assert [view.trust_remote_code for view in take_views({"text_encoder": "t"})] == [False]


def test_trust_without_encoders_that_run_is_refused():
    with pytest.raises(InputError, match="trust_remote_code: is for encoders that run"):
        run_config({"dataset": "d", "method": "id", "trust_remote_code": True})
    with pytest.raises(InputError, match="trust_remote_code: expected True or False, found 'yes'"):
        take_views({"text_encoder": "t", "trust_remote_code": "yes"})
