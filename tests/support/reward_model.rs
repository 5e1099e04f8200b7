//! A reward model: the tiny NeMo model with the regression head of tests/fixtures/reward.

use std::path::Path;

use super::root;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").map(|entry| entry.expect("an entry")) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            _ = std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

/// Makes it in `home`; its path.
pub(crate) fn reward_model(home: &Path) -> String {
    let folder = home.join("reward");
    copy(&root().join("tests/fixtures/golden/tiny-nemo"), &folder);
    let config = folder.join("model_config.yaml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    std::fs::write(config, text + "\nregression:\n  num_attributes: 9\n").expect("written");
    let weights = folder.join("model_weights");
    std::fs::remove_dir_all(weights.join("model.output_layer.weight")).expect("it is not used");
    for name in ["model.rm_head.weight", "model.rm_head.bias"] {
        copy(&root().join("tests/fixtures/reward").join(name), &weights.join(name));
    }
    folder.display().to_string()
}
