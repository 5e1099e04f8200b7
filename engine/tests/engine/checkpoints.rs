//! One small model as other software has written it (tests/python/foreign_checkpoints.py), against what transformers computes with it.

use super::support::{LIMITS, Output, engine, fixtures, floats, generate, greedy, ids, json};
use nemotron_engine::backend::ComputeType;
use nemotron_engine::chat::{ChatTemplate, Message, Role};
use nemotron_engine::checkpoint::{self, CheckpointError, Manifest, Target, TensorName};
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::ModelSource;
use nemotron_engine::request::{LogprobSpec, Request};

const TOKENS: LogprobSpec = LogprobSpec { tokens: true, prompt: true, top: 1, full: false, rewards: false };

fn foreign(name: &str) -> ModelSource {
    ModelSource::Path(fixtures().join("foreign").join(name))
}

fn outputs(model: &ModelSource, mesh: Mesh, cases: &serde_json::Value) -> Vec<Output> {
    let requests = cases.as_array().unwrap().iter().map(|case| {
        let new_tokens = case["greedy"].as_array().unwrap().len() as u32;
        Request { logprobs: TOKENS, ..greedy(ids(&case["ids"]), new_tokens) }
    });
    generate(&engine(model, ComputeType::F32, mesh, LIMITS), requests.collect::<Vec<_>>())
}

/// Formats, and which weights they hold.
const CHECKPOINTS: [(&str, &str, &str); 10] = [
    ("transformers", "Hugging Face safetensors", "bf16"),
    ("transformers-sharded", "Hugging Face safetensors", "bf16"),
    ("zarr-tp1", "NeMo folder (zarr)", "bf16"),
    ("zarr-tp2", "NeMo folder (zarr)", "bf16"),
    ("zarr-tp8", "NeMo folder (zarr)", "bf16"),
    ("archive.nemo", "NeMo archive (zarr)", "bf16"),
    ("torch_dist", "NeMo folder (torch_dist)", "bf16"),
    ("llama.cpp-bf16.gguf", "GGUF", "bf16"),
    ("fp8-channel", "Hugging Face safetensors", "fp8-channel"),
    ("fp8-tensor", "Hugging Face safetensors", "fp8-tensor"),
];

#[test]
fn checkpoints_of_other_software_give_the_tokens_of_transformers() {
    let expected = json("foreign/expected.json");
    let mut first: std::collections::HashMap<&str, Vec<Output>> = std::collections::HashMap::new();
    for (name, format, weights) in CHECKPOINTS {
        let source = checkpoint::open(&foreign(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(source.format(), format, "{name}");
        assert_eq!(source.config().num_parameters(), 86_336, "{name}");
        let tokenizer = source.tokenizer().unwrap();
        let cases = &expected[weights];
        for case in cases.as_array().unwrap() {
            assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap()), ids(&case["ids"]), "{name}");
        }
        for (tp, pp) in [(1, 1), (2, 2)] {
            let outputs = outputs(&foreign(name), Mesh { tp, pp }, cases);
            for (case, output) in cases.as_array().unwrap().iter().zip(&outputs) {
                assert_eq!(output.ids, ids(&case["greedy"]), "{name} on tp {tp} pp {pp}: {}", case["prompt"]);
                for (ours, theirs) in output.token_logprobs().iter().zip(floats(&case["logprobs"])) {
                    assert!((ours - theirs).abs() < 1e-4, "{name}: {ours} instead of {theirs}");
                }
            }
            // The same weights give the same bits, whatever file they come from.
            match first.get(weights) {
                Some(first) => assert_eq!(first, &outputs, "{name} on tp {tp} pp {pp}"),
                None => drop(first.insert(weights, outputs)),
            }
        }
    }
}

fn converted(model: &ModelSource, target: Target) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let source = checkpoint::open(model).unwrap();
    checkpoint::convert(&*source, target, directory.path(), &|_, _| {}).unwrap();
    directory
}

fn path(directory: &tempfile::TempDir) -> ModelSource {
    ModelSource::Path(directory.path().to_owned())
}

#[test]
fn every_format_converts_to_hugging_face_and_to_shards_with_the_same_tokens() {
    let expected = json("foreign/expected.json");
    let mesh = Mesh { tp: 2, pp: 2 };
    for (name, _, weights) in CHECKPOINTS {
        let cases = &expected[weights];
        let original = outputs(&foreign(name), mesh, cases);
        let hugging_face = converted(&foreign(name), Target::HuggingFace { shard_bytes: 60_000 });
        assert!(hugging_face.path().join("model.safetensors.index.json").exists(), "{name}");
        assert_eq!(outputs(&path(&hugging_face), mesh, cases), original, "{name} as Hugging Face");
        let shards = converted(&path(&hugging_face), Target::Shards(mesh));
        assert_eq!(outputs(&path(&shards), mesh, cases), original, "{name} as shards");
        let error = checkpoint::open_for(&path(&shards), Mesh { tp: 1, pp: 1 }).err().unwrap();
        assert!(matches!(error, CheckpointError::Mesh { found, .. } if found == mesh), "{error}");
        // Shards are a checkpoint like any other for a conversion.
        let back = converted(&path(&shards), Target::HuggingFace { shard_bytes: 60_000 });
        assert_eq!(outputs(&path(&back), mesh, cases), original, "{name} from shards");
    }
}

#[test]
fn the_built_in_model_in_shards_for_sixteen_ranks() {
    let mesh = Mesh { tp: 8, pp: 2 };
    let shards = converted(&ModelSource::Builtin, Target::Shards(mesh));
    let cases = json("nemotron-shakespeare/expected.json");
    let cases = &cases["cases"].as_array().unwrap()[..2];
    let engine = engine(&path(&shards), ComputeType::F32, mesh, LIMITS);
    let requests = cases.iter().map(|case| {
        let mut request = greedy(ids(&case["ids"]), case["greedy"].as_array().unwrap().len() as u32);
        request.stopping.eos_ids = vec![3, 5];
        request
    });
    for (case, output) in cases.iter().zip(generate(&engine, requests)) {
        assert_eq!(output.ids, ids(&case["greedy"]));
    }
}

#[test]
fn a_stopped_conversion_goes_on_and_a_foreign_directory_is_left_alone() {
    let source = checkpoint::open(&foreign("transformers")).unwrap();
    let target = Target::HuggingFace { shard_bytes: 60_000 };
    let directory = tempfile::tempdir().unwrap();
    let whole = checkpoint::convert(&*source, target, directory.path(), &|_, _| {}).unwrap();
    assert_eq!(whole.kept, 0);
    let manifest = std::fs::read(Manifest::path(directory.path())).unwrap();

    // As a stop leaves it: some files are complete and noted, the manifest is not there.
    let again = tempfile::tempdir().unwrap();
    let stop = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        checkpoint::convert(&*source, target, again.path(), &|done, total| assert!(done < total, "stop")).unwrap()
    }));
    assert!(stop.is_err());
    assert!(!Manifest::path(again.path()).exists());
    let rest = checkpoint::convert(&*source, target, again.path(), &|_, _| {}).unwrap();
    assert_eq!((rest.files, rest.bytes), (whole.files, whole.bytes));
    assert_eq!(std::fs::read(Manifest::path(again.path())).unwrap(), manifest);

    std::fs::write(again.path().join("mine"), "").unwrap();
    assert!(checkpoint::convert(&*source, target, again.path(), &|_, _| {}).is_err());
}

fn copied(name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixtures().join("foreign").join(name)).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    directory
}

#[test]
fn modelopts_fp8_is_that_of_others_under_another_name() {
    let read = |model: &ModelSource| {
        let source = checkpoint::open(model).unwrap();
        let bits = |name| source.tensor(name).unwrap().to_f32().into_iter().map(f32::to_bits);
        TensorName::all(source.config()).flat_map(bits).collect::<Vec<_>>()
    };
    let expected = read(&foreign("fp8-tensor"));
    let with = |quantization: Option<serde_json::Value>| {
        let directory = copied("fp8-tensor");
        let file = directory.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let config_fields = config.as_object_mut().unwrap();
        config_fields.remove("quantization_config");
        config_fields.extend(quantization.map(|quantization| ("quantization_config".to_owned(), quantization)));
        std::fs::write(file, config.to_string()).unwrap();
        directory
    };
    let producer = serde_json::json!({"name": "modelopt", "version": "0.47.0"});
    let new = serde_json::json!({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "producer": producer});
    assert!(read(&path(&with(Some(new)))) == expected);
    // Its older exports say so in a file beside the configuration.
    let old = with(None);
    let text = serde_json::json!({"producer": producer, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}});
    std::fs::write(old.path().join("hf_quant_config.json"), text.to_string()).unwrap();
    assert!(read(&path(&old)) == expected);
    let other = serde_json::json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    let error = checkpoint::open(&path(&with(Some(other)))).err().unwrap();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("quant_algo is NVFP4"), "{error:?}");
}

/// As llama.cpp's converter writes them when a `tokenizer_config.json` lists them as special.
#[test]
fn symbols_that_a_gguf_file_calls_control_pieces_are_symbols_all_the_same() {
    const CONTROL: i32 = 3;
    let file = fixtures().join("foreign/llama.cpp-bf16.gguf");
    let mut bytes = std::fs::read(&file).unwrap();
    let key = b"tokenizer.ggml.token_type";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    let tokenizer =
        |file: &std::path::Path| checkpoint::open(&ModelSource::Path(file.to_owned())).unwrap().tokenizer().unwrap();
    let expected = tokenizer(&file);
    let symbols = (0..).map_while(|number| expected.token_id(&format!("<extra_id_{number}>")));
    let special: Vec<u32> = symbols.chain(expected.token_id("<unk>")).collect();
    assert!(special.len() > 2);
    for id in special {
        // The type of the array, that of its elements, their number.
        let at = at + 16 + 4 * id as usize;
        bytes[at..at + 4].copy_from_slice(&CONTROL.to_le_bytes());
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.gguf");
    std::fs::write(&file, bytes).unwrap();
    let found = tokenizer(&file);
    let text = "<extra_id_1>User\nSing \u{1f30a}<extra_id_1>Assistant\n";
    assert_eq!(found.encode(text), expected.encode(text));
    assert_eq!(found.decode(&found.encode(text)), text);
}

#[test]
fn the_chat_template_of_a_gguf_file_is_read_and_converted() {
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}";
    let key = "tokenizer.chat_template";
    let mut entry = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &8_u32.to_le_bytes()].concat();
    // Weights are aligned to 32 bytes behind the header, and stay where they are.
    let text = format!("{template:width$}", width = template.len() + 32 - (entry.len() + 8 + template.len()) % 32);
    entry.extend([&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat());
    let mut bytes = std::fs::read(fixtures().join("foreign/llama.cpp-bf16.gguf")).unwrap();
    let keys = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) + 1;
    bytes[16..24].copy_from_slice(&keys.to_le_bytes());
    bytes.splice(24..24, entry);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.gguf");
    std::fs::write(&file, bytes).unwrap();
    let source = checkpoint::open(&ModelSource::Path(file.clone())).unwrap();
    assert_eq!(source.chat_template().as_deref(), Some(&*text));
    let messages = [Message { role: Role::User, content: "Sing.".into() }];
    let render = |template: ChatTemplate| template.render(&messages, "", "").unwrap().trim_end().to_owned();
    assert_eq!(render(ChatTemplate::from_source(&text, "test").unwrap()), "[user] Sing.");
    let converted = converted(&ModelSource::Path(file), Target::HuggingFace { shard_bytes: u64::MAX });
    assert_eq!(render(ChatTemplate::for_checkpoint(Some(converted.path())).unwrap()), "[user] Sing.");
    let cases = &json("foreign/expected.json")["bf16"];
    let mesh = Mesh { tp: 1, pp: 1 };
    assert_eq!(outputs(&path(&converted), mesh, cases), outputs(&foreign("transformers"), mesh, cases));
}
