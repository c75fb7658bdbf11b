"""The commands as they are typed: what they print, what they leave, and one line for what is wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from drawn_scenes import write_dataset
from PIL import Image

from data_prep.bop.__main__ import COMMANDS, main
from data_prep.bop.format import BopDataset, write_targets
from data_prep.bop.index import PoseSource
from data_prep.bop.results import PoseEstimate, write_results
from data_prep.bop.shards import write_shards


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands") / "data"
    write_dataset(root)
    write_shards(BopDataset(root, "train"), root / "train_web", images_per_shard=2)
    return root


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def refused(capsys, *arguments: object) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as error:
        main([str(each) for each in arguments])
    assert error.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_index_and_check_every_split(root, capsys):
    main(["index", str(root)])
    scenes, shards = capsys.readouterr().out.strip().splitlines()
    assert scenes.startswith(f"{root / 'train'}: 6 pictures, 24 poses of 2 objects, 0 pictures left out")
    assert scenes.endswith("multiplied with depth_scale")
    assert shards.startswith(f"{root / 'train_web'}: 6 pictures, 24 poses of 2 objects, 0 pictures left out, 0 shards")
    assert shards.endswith("divided by depth_scale")
    main(["check", str(root)])
    count = len(PoseSource(root / "train"))
    assert capsys.readouterr().out == f"samples: {2 * count}, objects: 2, bad: 0\n"
    main(["check", str(root / "train_web"), "--num_samples", "3", "--min_visib", "0.5"])
    assert capsys.readouterr().out == "samples: 3, objects: 2, bad: 0\n"


def test_bad_samples_and_meshes_are_named(root, capsys):
    path = root / "train" / "000000" / "mask_visib" / "000000_000000.png"
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(path)
    (root / "models" / "obj_000002.ply").unlink()
    with pytest.raises(SystemExit) as error:
        main(["check", str(root / "train")])
    assert error.value.code == 2
    mesh, sample, count = capsys.readouterr().out.strip().splitlines()
    assert mesh.startswith("the mesh of object 2 is missing")
    assert sample.endswith("no pixel of the object is seen")
    assert count.endswith("bad: 2")


def test_damaged_shards_are_named_and_skipped(root, capsys):
    tar = root / "train_web" / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    main(["index", str(root / "train_web")])
    first, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("shard-000002.tar is damaged: ")
    assert "1 shards damaged" in last
    assert "skip_shards" in refused(capsys, "check", root / "train_web")
    main(["check", str(root / "train_web"), "--skip_shards", "2"])
    assert "bad: 0" in capsys.readouterr().out


def test_results_are_checked(root, capsys):
    write_targets(root, "train")
    [target, *_] = json.loads((root / "test_targets_bop19.json").read_text())
    path = root / "vpog_made-train.csv"
    pose = np.eye(4)
    write_results(path, [PoseEstimate(target["scene_id"], target["im_id"], target["obj_id"], 1.0, pose)])
    main(["check", str(path), "--dataset", str(root)])
    assert capsys.readouterr().out == f"{path}: 0 problems\n"
    write_results(path, [PoseEstimate(77, 0, 1, 1.0, pose)])
    with pytest.raises(SystemExit) as error:
        main(["check", str(path), "--dataset", str(root)])
    assert error.value.code == 2
    assert "no target" in capsys.readouterr().out
    assert "is missing" in refused(capsys, "check", root / "none_made-train.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing; the commands are render_templates, index, check, make_scenes"),
        (["idnex"], "did you mean index?"),
        (["index"], "FOLDER is required"),
        (["index", "nowhere"], "nowhere holds neither .tar shards nor BOP scenes"),
        (["index", "nowhere", "--deph", "divide"], "did you mean --depth?"),
        (["check", "nowhere", "--dataset", "x"], "--dataset is for a csv file"),
        (["check", "nowhere", "--min_visib", "1"], "--min_visib 1"),
        (["render_templates", "--models", "m", "--out", "o", "--views", "100"], "--views 100"),
        (["make_scenes", "--out", "o", "--image_size", "4", "100"], "--image_size must be at least 8 8"),
        (["make_scenes", "--out", "o", "--split", "../x"], "--split ../x"),
    ],
)
def test_a_wrong_command_has_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_shards_without_models_are_refused(root, capsys):
    shutil.rmtree(root / "models")
    assert "name the folder of the models with --models" in refused(capsys, "index", root)
    assert "python -m data_prep.bop index" in refused(capsys, "check", root / "train_web")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_torch(command):
    code = f"import sys; from data_prep.bop.__main__ import main; main([{command!r}, '--help'])"
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    assert f"python -m data_prep.bop {command}" in result.stdout
    assert " torch\n" not in result.stderr
