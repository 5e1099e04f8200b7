//! The engine on devices: the binary's CUDA backend, graphs and collectives run as they are, over stand-ins for NVIDIA's libraries that
//! carry kernels out on the CPU (`tests/standin`).

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use futures_util::future::join_all;
use nemotron_engine::backend::ComputeType;
use nemotron_engine::checkpoint;
use nemotron_engine::config::Mesh;
use nemotron_engine::memory::rank_memory;
use nemotron_engine::rank::{Device, Limits, ModelSource};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::standin::libraries;
use super::support::{finish, nemotron, root};

/// What bf16 moves a log-probability of the golden model by, at most: queries and weights of attention are rounded too.
const TOLERANCE: f64 = 0.05;

/// A place for one run.
struct World {
    home: TempDir,
}

impl World {
    fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    fn command(&self) -> Command {
        let mut command = nemotron(self.home.path());
        command.env("LD_LIBRARY_PATH", libraries());
        command
    }

    /// `launch --serve` of the golden model as run `run`, until it is ready; the exit code and stderr.
    fn launch(&self, arguments: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
        let mut command = self.command();
        command.args(["launch", "--serve", "--wait", "ready", "--port", "0", "--no-auth", "--name", "run", "--model"]);
        command
            .arg(root().join("tests/fixtures/golden/tiny-hf"))
            .args(["--set", "limits.kv_tokens=4096"])
            .args(arguments);
        let (code, _, stderr) = finish(command.envs(variables.iter().copied()));
        (code, stderr)
    }

    /// A run that must become ready.
    fn serve(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Server<'_> {
        let (code, stderr) = self.launch(arguments, variables);
        assert_eq!(code, 0, "{stderr}\n{}", self.logs());
        let endpoint: Value = serde_json::from_slice(&fs::read(self.run().join("endpoint.json")).unwrap()).unwrap();
        Server { world: self, url: endpoint["url"].as_str().unwrap().to_owned() }
    }

    fn run(&self) -> PathBuf {
        self.home.path().join("runs/run")
    }

    /// What the stand-in driver of each rank wrote to `CUDA_STANDIN_LOG`, the file `driver` of the world.
    fn driver_logs(&self) -> Vec<String> {
        let paths = fs::read_dir(self.home.path()).unwrap().map(|file| file.unwrap().path());
        let logs = paths.filter(|path| path.file_stem().is_some_and(|name| name == "driver"));
        logs.map(|path| fs::read_to_string(path).unwrap()).collect()
    }

    /// Bytes of its device that each rank holds, sorted.
    fn held(&self) -> Vec<u64> {
        let bytes = |line: &str, kind| line.strip_prefix(kind).map_or(0, |bytes| bytes.trim().parse().unwrap());
        let logs = self.driver_logs();
        let ranks = logs.iter().map(|log| {
            let allocated: u64 = log.lines().map(|line| bytes(line, "alloc")).sum();
            allocated - log.lines().map(|line| bytes(line, "free")).sum::<u64>()
        });
        ranks.collect::<BTreeSet<u64>>().into_iter().collect()
    }

    /// Bytes that the plan counts on for each rank, sorted.
    fn planned(&self) -> Vec<u64> {
        let lock: toml::Table = fs::read_to_string(self.run().join("run.lock.toml")).unwrap().parse().unwrap();
        let (limits, mesh): (Limits, Mesh) =
            (lock["limits"].clone().try_into().unwrap(), lock["mesh"].clone().try_into().unwrap());
        let model = ModelSource::Path(root().join("tests/fixtures/golden/tiny-hf"));
        let config = checkpoint::open(&model).unwrap().config().clone();
        let ranks = (0..mesh.world_size()).map(|rank| {
            let memory = rank_memory(&config, mesh, rank, ComputeType::Bf16, Device::Cuda, &limits);
            memory.fixed() + (limits.num_pages * limits.page_tokens) as u64 * memory.kv_bytes_per_token
        });
        ranks.collect::<BTreeSet<u64>>().into_iter().collect()
    }

    fn logs(&self) -> String {
        let files = fs::read_dir(self.run().join("attempt-000")).into_iter().flatten();
        files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        _ = self.command().args(["cancel", "run"]).output();
    }
}

struct Server<'a> {
    world: &'a World,
    url: String,
}

impl Server<'_> {
    /// The answer to greedy requests for 16 tokens.
    async fn put(&self, changes: Value) -> Value {
        let mut body = json!({
            "tokens_to_generate": 16, "temperature": 1.0, "top_k": 1, "top_p": 0.0, "greedy": true, "add_BOS": false,
            "repetition_penalty": 1.0, "min_tokens_to_generate": 16, "end_strings": ["<extra_id_1>"],
        });
        body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        client.put(format!("{}/generate", self.url)).json(&body).send().await.unwrap().json().await.unwrap()
    }

    /// Text, reason of its end and number of tokens of what OpenAI's route answers.
    async fn complete(&self, body: &Value) -> [Value; 3] {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let reply = client.post(format!("{}/v1/completions", self.url)).json(body).send().await.unwrap();
        let reply: Value = reply.json().await.unwrap();
        let choice = &reply["choices"][0];
        assert!(choice["text"].is_string(), "{body}: {reply}");
        [choice["text"].clone(), choice["finish_reason"].clone(), reply["usage"]["completion_tokens"].clone()]
    }

    /// Waits for the end of the run; its exit code and the last words of the supervisor.
    fn end(&self) -> (i32, String) {
        let (code, stdout, stderr) = finish(self.world.command().args(["wait", "run", "--for", "done"]));
        (code, stdout + &stderr + &self.world.logs())
    }
}

fn golden() -> Vec<Value> {
    let path = root().join("tests/fixtures/golden/expected.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[tokio::test]
async fn golden_prompts_on_one_device_and_on_four() {
    let meshes: [&[&str]; 2] = [&["--profile", "h100x1"], &["--profile", "h200x8", "--tp", "2", "--pp", "2"]];
    for mesh in meshes {
        let world = World::new();
        let server = world.serve(mesh, &[]);
        for case in golden() {
            let asked = json!({"sentences": [case["prompt"]], "compute_logprob": true, "all_probs": true});
            let reply = server.put(asked).await;
            let (prompt, greedy) = (case["ids"].as_array().unwrap(), case["greedy32"].as_array().unwrap());
            let found = reply["token_ids"][0].as_array().unwrap();
            // Where the runner-up is nearer than what rounding moves, another token may win.
            if case["greedy32_min_margin"].as_f64().unwrap() > 0.02 {
                assert_eq!(found[..], [prompt, &greedy[..16]].concat(), "{mesh:?} {}", case["prompt"]);
            }
            let last = floats(&reply["full_logprob"][0][prompt.len() - 1]);
            let total = case["last_logsumexp"].as_f64().unwrap();
            for (found, logit) in last.iter().zip(floats(&case["logits_last_first16"])) {
                assert!((found - (logit - total)).abs() < TOLERANCE, "{mesh:?}: {found} is not {}", logit - total);
            }
        }
    }
}

/// Sums of few rows in one kernel over peers' memory, or by NCCL: the same bits.
#[tokio::test]
async fn sums_through_the_memory_of_peers_have_the_bits_of_those_through_nccl() {
    let mut replies = Vec::new();
    for (standin, words) in [("", "go through the memory of the devices"), ("peers=0", "has no path to this one")] {
        let world = World::new();
        let log = world.home.path().join("driver").display().to_string();
        let variables = [("CUDA_STANDIN", standin), ("CUDA_STANDIN_LOG", &log)];
        let server = world.serve(&["--profile", "h200x8", "--tp", "2", "--pp", "2"], &variables);
        if standin.is_empty() {
            assert_eq!(world.held(), world.planned(), "what is allocated is what was planned");
        }
        let logs = world.logs();
        assert_eq!(logs.matches(words).count(), 4, "every rank says which way its sums go: {logs}");
        let driver = world.driver_logs();
        assert_eq!(driver.len(), 4);
        assert!(driver.iter().all(|log| log.contains("launch all_reduce_norm") == standin.is_empty()), "and they do");
        let prompts = golden().into_iter().map(|case| case["prompt"].clone());
        let asked = prompts.map(|prompt| json!({"sentences": [prompt], "compute_logprob": true}));
        replies.push(join_all(asked.map(|asked| server.put(asked))).await);
    }
    assert_eq!(replies[0], replies[1]);
}

#[tokio::test]
async fn a_row_is_the_same_alone_and_beside_others_and_nothing_is_allocated_while_serving() {
    let world = World::new();
    let log = world.home.path().join("driver").display().to_string();
    let server = world.serve(&["--profile", "h100x1"], &[("CUDA_STANDIN_LOG", &log)]);
    assert_eq!(world.held(), world.planned(), "what is allocated is what was planned");
    let prompts: Vec<Value> = golden().iter().map(|case| case["prompt"].clone()).collect();
    let asked = |prompt: &Value| json!({"sentences": [prompt], "compute_logprob": true});
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(server.put(asked(prompt)).await);
    }
    let allocations = || world.driver_logs().concat().lines().filter(|line| line.starts_with("alloc")).count();
    let before = allocations();
    let together = join_all(prompts.iter().chain(&prompts).map(|prompt| server.put(asked(prompt)))).await;
    for (index, reply) in together.iter().enumerate() {
        assert_eq!(*reply, alone[index % alone.len()]);
    }
    assert_eq!(allocations(), before, "device memory was allocated for a request");
}

/// The next step is on the device before the host reads what the last one chose; no row can tell, whatever begins, ends or leaves beside it.
#[tokio::test]
async fn steps_follow_each_other_without_the_host_and_rows_stay_the_same() {
    let meshes: [&[&str]; 2] = [&["--profile", "h100x1"], &["--profile", "h200x8", "--tp", "2", "--pp", "1"]];
    for mesh in meshes {
        let world = World::new();
        let log = world.home.path().join("driver").display().to_string();
        // Fewer slots than rows: they are used again.
        let arguments = [mesh, &["--set", "limits.max_sequences=4"]].concat();
        let server = world.serve(&arguments, &[("CUDA_STANDIN_LOG", &log)]);
        let prompts: Vec<Value> = golden().iter().map(|case| case["prompt"].clone()).collect();
        server
            .complete(&json!({"prompt": prompts[0], "max_tokens": 16, "temperature": 0, "min_tokens_to_generate": 16}))
            .await;
        // Steps that chose tokens which were not yet read: two steps at the start, then sixteen.
        let logs = world.driver_logs();
        let log = logs.iter().find(|log| log.contains("launch sample")).unwrap();
        let (mut open, mut depths) = (0, Vec::new());
        for line in log.lines().skip_while(|line| *line != "launch sample") {
            match line {
                "launch sample" => {
                    open += 1;
                    depths.push(open);
                }
                "seen" => open -= 1,
                _ => {}
            }
        }
        assert_eq!((depths, open), ([vec![1, 2, 1], vec![2; 15]].concat(), 0), "{mesh:?}");

        let mut rows = Vec::new();
        for index in 0..12 {
            let mut row = json!({
                "prompt": prompts[index % prompts.len()], "max_tokens": 4 + index * 5 % 23, "seed": index,
                "temperature": if index % 3 == 0 { 0.0 } else { 0.9 },
            });
            match index % 4 {
                1 => row["logit_bias"] = json!({"3": 7}),
                2 => row["top_k"] = json!(40),
                _ => {}
            }
            if index == 5 {
                row["frequency_penalty"] = json!(0.5);
            }
            rows.push(row);
        }
        // With log-probabilities the host chooses, from one step to the next.
        let alone = async |row: &Value| {
            let mut row = row.clone();
            row["logprobs"] = json!(1);
            server.complete(&row).await
        };
        let text = alone(&rows[0]).await[0].as_str().unwrap().to_owned();
        let middle: String = text.chars().skip(2).take(3).collect();
        rows.push(json!({"prompt": prompts[0], "max_tokens": 60, "temperature": 0, "stop": middle}));
        let mut expected = Vec::new();
        for row in &rows {
            expected.push(alone(row).await);
        }
        let stopped = expected.iter().filter(|[_, reason, _]| reason == "stop").count();
        assert!((2..rows.len()).contains(&stopped), "some rows end before their length: {expected:?}");
        let leaves = async {
            let body = json!({"prompt": prompts[1], "max_tokens": 200, "temperature": 0.9});
            _ = tokio::time::timeout(Duration::from_millis(400), server.complete(&body)).await;
        };
        let together = join_all(rows.iter().enumerate().map(async |(index, row)| {
            tokio::time::sleep(Duration::from_millis(50 * index as u64)).await;
            server.complete(row).await
        }));
        let (found, ()) = tokio::join!(together, leaves);
        assert_eq!(found, expected, "{mesh:?}");
    }
}

#[tokio::test]
async fn a_device_that_fails_ends_the_run_with_the_kernel_named() {
    let world = World::new();
    let (code, stderr) = world.launch(&["--profile", "h100x1"], &[("CUDA_STANDIN", "fail=5")]);
    let text = stderr + &world.logs();
    assert_eq!(code, 23, "{text}");
    assert!(text.contains("CUDA_ERROR_LAUNCH_FAILED"), "{text}");
}

#[test]
fn a_device_without_room_or_too_old_is_refused_before_anything_is_loaded() {
    for (standin, exit, words) in [("memory=200", 27, "GiB are free"), ("major=7", 23, "compute capability 7.0")] {
        let world = World::new();
        let arguments = ["--profile", "h100x1", "--set", "limits.kv_tokens=400000"];
        let (code, stderr) = world.launch(&arguments, &[("CUDA_STANDIN", standin)]);
        let text = stderr + &world.logs();
        assert_eq!(code, exit, "{text}");
        assert!(text.contains(words), "{text}");
    }
}

/// NVRTC is the real one: what it makes of the kernels for this device is machine code.
#[test]
fn kernels_are_compiled_for_a_device_whose_driver_refuses_the_images() {
    let world = World::new();
    let (code, stderr) = world.launch(&["--profile", "h100x1"], &[("CUDA_STANDIN", "refuse=1")]);
    let text = stderr + &world.logs();
    assert_eq!(code, 23, "{text}");
    assert!(text.contains("CUDA_ERROR_NO_BINARY_FOR_GPU") && text.contains("libnvrtc.so"), "{text}");

    let world = World::new();
    let nvrtc = nvrtc();
    let nvrtc = nvrtc.to_str().unwrap();
    world.serve(&["--profile", "h100x1"], &[("CUDA_STANDIN", "refuse=1"), ("NEMOTRON_CUDA_LIBS", nvrtc)]);
    assert!(world.logs().contains("they are compiled"), "{}", world.logs());
}

#[tokio::test]
async fn a_device_that_is_lost_ends_the_run_and_an_error_of_a_program_does_not() {
    let world = World::new();
    let (code, stderr) = world.launch(&["--profile", "h100x1"], &[("NVML_STANDIN", "xid=79,after=3000")]);
    let server = Server { world: &world, url: String::new() };
    let (code, text) = if code == 0 { server.end() } else { (code, stderr + &world.logs()) };
    assert_eq!(code, 23, "{text}");
    assert!(text.contains("Xid 79"), "{text}");

    let world = World::new();
    let server = world.serve(&["--profile", "h100x1"], &[("NVML_STANDIN", "xid=13")]);
    assert!(server.put(json!({"sentences": ["a"]})).await["sentences"].is_array());
    assert!(world.logs().contains("the driver reports an error of the device"), "{}", world.logs());
}

#[test]
fn a_rank_that_does_not_join_ends_the_run_at_the_deadline() {
    let world = World::new();
    let arguments = ["--profile", "h200x8", "--tp", "2", "--pp", "1", "--set", "deadlines.comm_init=3s"];
    let (code, stderr) = world.launch(&arguments, &[("NCCL_STANDIN", "hang=1")]);
    let text = stderr + &world.logs();
    assert!(matches!(code, 20 | 24), "{code}: {text}");
    assert!(text.contains("NCCL did not start among the ranks 0 to 1") || text.contains("COMM_INIT"), "{text}");
}

#[tokio::test]
async fn a_failed_exchange_ends_the_run() {
    let world = World::new();
    let arguments = ["--profile", "h200x8", "--tp", "2", "--pp", "1"];
    let server = world.serve(&arguments, &[("NCCL_STANDIN", "fail=60")]);
    // More exchanges than that, one at least for each token's logits, and fewer until the server is ready. Whether a client hears of it
    // depends on who is first.
    let request = json!({"sentences": ["a"], "tokens_to_generate": 200, "min_tokens_to_generate": 200});
    _ = tokio::time::timeout(Duration::from_secs(60), server.put(request)).await;
    let (code, text) = server.end();
    assert_eq!(code, 24, "{text}");
    assert!(text.contains("NCCL failed among the ranks 0 to 1 of stage 0"), "{text}");
}

#[tokio::test]
async fn a_killed_rank_ends_the_run_though_nccl_waits_for_ever() {
    let world = World::new();
    let server = world.serve(&["--profile", "h200x8", "--tp", "2", "--pp", "1"], &[]);
    let status: Value = serde_json::from_slice(&fs::read(world.run().join("status.json")).unwrap()).unwrap();
    let ranks: Vec<i32> = status["ranks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rank| rank["process"]["pid"].as_i64().unwrap() as i32)
        .collect();
    let request = server.put(json!({"sentences": ["a"], "tokens_to_generate": 200}));
    let end = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        kill(Pid::from_raw(ranks[1]), Signal::SIGKILL).unwrap();
        server.end()
    };
    let (_, (code, text)) = tokio::join!(tokio::time::timeout(Duration::from_secs(30), request), end);
    assert_eq!(code, 25, "{text}");
    assert!(text.contains("rank 1"), "{text}");
    let left: BTreeSet<i32> = ranks.into_iter().filter(|pid| kill(Pid::from_raw(*pid), None).is_ok()).collect();
    assert!(left.is_empty(), "{left:?} still run");
}

/// The dry run of what a machine with a device is checked with.
#[test]
fn gpu_check_runs_from_the_packed_folder_alone() {
    let world = World::new();
    let (pack, out) = (world.home.path().join("pack"), world.home.path().join("out"));
    let script = root().join("scripts/gpu-check");
    let mut packing = Command::new(&script);
    let (code, _, stderr) =
        finish(packing.arg("pack").arg(&pack).env("NEMOTRON_BINARY", env!("CARGO_BIN_EXE_nemotron")));
    assert_eq!(code, 0, "{stderr}");
    let mut run = Command::new(pack.join("gpu-check"));
    run.arg("run").args([&pack, &out]).env("LD_LIBRARY_PATH", libraries()).env("GPU_CHECK", "small");
    // What the copy is measured with is a share of the memory.
    run.env("CUDA_STANDIN", "memory=1000");
    let (code, stdout, stderr) = finish(run.env("PYTHON", python_with_numpy()));
    assert_eq!(code, 0, "{stdout}{stderr}");
    let report: Value = serde_json::from_slice(&fs::read(out.join("gpu-check.json")).unwrap()).unwrap();
    for step in ["doctor", "kernels", "golden", "rank"] {
        assert_eq!(report["steps"][step]["state"], "ok", "{report}");
    }
    assert!(
        stdout.contains("passed     golden log-probabilities") && stdout.contains("not judged decode 4"),
        "{stdout}"
    );

    // A limit that is missed fails its step.
    let script = pack.join("gpu_kernels.py");
    let strict = fs::read_to_string(&script)
        .unwrap()
        .replace("BF16_LIMIT, F32_LIMIT = 1e-2, 1e-5", "BF16_LIMIT, F32_LIMIT = 1e-9, 1e-5");
    fs::write(&script, strict).unwrap();
    let mut step = Command::new(python_with_numpy());
    step.arg(pack.join("gpu_check.py")).args([&pack, &out]).arg("kernels");
    finish(step.env("LD_LIBRARY_PATH", libraries()).env("CUDA_STANDIN", "memory=1000"));
    let step: Value = serde_json::from_slice(&fs::read(out.join("step-kernels.json")).unwrap()).unwrap();
    assert_eq!((&step["state"], &step["reason"]), (&"FAILED".into(), &"a limit is missed".into()), "{step}");

    let rank = &report["steps"]["rank"];
    assert_eq!(rank["nccl"]["version"], "2.24.3", "{rank}");
    assert!(
        rank["decode"]["4"]["ms"].as_f64().unwrap() > 0.0 && rank["prefill"]["32"]["share"].as_f64().unwrap() > 0.0
    );
}

/// The folder of the NVRTC that `scripts/compile-kernels` uses, and fetches where it has not yet been.
fn nvrtc() -> PathBuf {
    let home = root().join("target/nvrtc/12.4.127");
    let folder = home.join("nvidia/cuda_nvrtc/lib");
    if !folder.join("libnvrtc.so.12").exists() {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "-q", "--no-deps", "nvidia-cuda-nvrtc-cu12==12.4.127", "--target"]);
        assert_eq!(finish(pip.arg(home)).0, 0);
    }
    folder
}

/// A Python that has numpy, made once.
fn python_with_numpy() -> PathBuf {
    let home = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("numpy");
    let python = home.join("bin/python3");
    if !python.exists() || !Command::new(&python).args(["-c", "import numpy"]).status().unwrap().success() {
        let run = |command: &mut Command| assert_eq!(finish(command).0, 0, "{command:?}");
        run(Command::new("python3").args(["-m", "venv"]).arg(&home));
        run(Command::new(&python).args(["-m", "pip", "install", "-q", "numpy"]));
    }
    python
}
