#![expect(clippy::unwrap_used, reason = "tests")]
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::cluster::testing::site;
use crate::spec::testing::serve_spec;

fn render(site: &Site) -> Outcome<String> {
    job_script(&serve_spec("n"), site, Path::new("/runs/n"), Path::new("/opt/nemotron"))
}

fn variable(name: &str, value: &str) -> Variable {
    Variable { name: name.into(), value: value.into(), source: String::new() }
}

/// What bash prints when it runs `script` in an empty environment and folder.
fn bash(script: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("bash")
        .arg("-c")
        .arg(script)
        .current_dir(folder.path())
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Texts full of what shells take to be theirs.
fn hostile() -> impl Strategy<Value = String> {
    let pieces = [
        "'",
        "\"",
        "\\",
        "$(touch x)",
        "`touch x`",
        "${HOME}",
        "*",
        "~",
        "#",
        ";",
        "&",
        "|",
        "\n",
        " ",
        "!",
        "é",
        "字",
        "%j",
        "-",
        "=",
    ];
    prop::collection::vec(
        prop_oneof![proptest::sample::select(pieces.to_vec()).prop_map(str::to_owned), "[ -~]{0,3}"],
        0..8,
    )
    .prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bash_reads_back_every_value(set in hostile(), fabric in hostile(), inherited in hostile()) {
        let site = Site {
            set: vec![variable("A", &set)],
            fabric: vec![variable("B", &fabric), variable("C", &fabric)],
            ..site()
        };
        let script = render(&site).unwrap();
        let assignments: String = script.split("exec ").next().unwrap().into();
        let run = format!("export C={}\n{assignments}\nprintf '%s\\0' \"$A\" \"$B\" \"$C\"; ls -A", shell_quote(&inherited));
        prop_assert_eq!(bash(&run), format!("{set}\0{fabric}\0{inherited}\0").into_bytes());
    }

    #[test]
    fn the_binary_gets_the_run_directory(name in hostile()) {
        prop_assume!(!name.contains(['\n', '"', '\\', '/']));
        let run_dir = format!("/runs/{name}");
        let script = job_script(&serve_spec("n"), &site(), Path::new(&run_dir), Path::new("/bin/echo")).unwrap();
        prop_assert_eq!(bash(&script), format!("supervise {run_dir}\n").into_bytes());
    }

    #[test]
    fn a_directive_stays_on_its_line(value in hostile()) {
        let site = Site { constraint: Some(value.clone()), ..site() };
        match render(&site) {
            Err(failure) => prop_assert!(value.contains(['\n', '"', '\\']), "{value:?}: {failure}"),
            Ok(script) => {
                let lines = script.lines().filter(|line| line.starts_with("#SBATCH --constraint=")).count();
                prop_assert_eq!(lines, 1);
                prop_assert_eq!(bash(&script.replace("exec /opt/nemotron", "echo")), b"supervise /runs/n\n");
            }
        }
    }
}

#[test]
fn equal_input_gives_equal_bytes_and_a_script_that_one_can_read() {
    let script = render(&site()).unwrap();
    assert_eq!(script, render(&site()).unwrap());
    assert!(script.lines().count() < 60 && script.ends_with("\nexec /opt/nemotron supervise /runs/n\n"), "{script}");
    for line in [
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=02:00:00",
        "--signal=B:USR1@120",
        "--no-requeue",
    ] {
        assert!(script.contains(&format!("#SBATCH {line}\n")), "{line}\n{script}");
    }
    assert!(!script.contains("--account"), "{script}");
}

#[test]
fn devices_are_asked_for_as_the_site_wants() {
    for (gpu_request, gres_type, expected) in [
        (GpuRequest::GpusPerNode, Some("h100"), "--gpus-per-node=h100:8"),
        (GpuRequest::Gres, Some("h100"), "--gres=gpu:h100:8"),
        (GpuRequest::Gres, None, "--gres=gpu:8"),
        (GpuRequest::GpusPerTask, None, "--gpus-per-task=1"),
    ] {
        let script = render(&Site { gpu_request, gres_type: gres_type.map(str::to_owned), ..site() }).unwrap();
        assert!(script.contains(&format!("#SBATCH {expected}\n")), "{script}");
    }
    let script = render(&Site { gpu_request: GpuRequest::None, ..site() }).unwrap();
    assert!(!script.contains("gpu:") && !script.contains("--gpus"), "{script}");
}

#[test]
fn further_options_are_checked() {
    let extra = |option: &str| render(&Site { extra: vec![option.into()], ..site() });
    assert!(extra("--mail-type=END,FAIL").unwrap().contains("#SBATCH --mail-type=END,FAIL\n"));
    assert!(extra("--comment=a b # c").unwrap().contains("#SBATCH --comment=\"a b # c\"\n"));
    for option in ["--a\n#SBATCH --b", "--a=b\nrm -rf /", "-p gpu", "--a b"] {
        assert_eq!(extra(option).unwrap_err().exit, Exit::Usage, "{option}");
    }
}

#[test]
fn secrets_are_in_their_file_alone() {
    let canary = "canary-2f9c'$(x)";
    let variables = [("HF_TOKEN", canary), ("HTTPS_PROXY", "http://p"), ("OTHER", canary), ("SBATCH_PARTITION", "x")];
    let environment = Environment::new(variables.map(|(name, value)| (name.into(), value.into())), "/");
    let site = Site { secrets: vec!["HF_TOKEN".into()], pass: vec!["HTTPS_PROXY".into()], ..site() };
    let script = render(&site).unwrap();
    assert!(script.contains("\n. /runs/n/secrets.env\n") && !script.contains("canary"), "{script}");
    assert_eq!(submission_environment(&site, &environment), [("HTTPS_PROXY".to_owned(), "http://p".to_owned())]);
    let file = secrets_file(&site, &environment).unwrap().unwrap();
    assert_eq!(bash(&format!("{file}printf %s \"$HF_TOKEN\"")), canary.as_bytes());
    let site = Site { secrets: vec!["NOT_SET".into()], ..site };
    assert_eq!(secrets_file(&site, &environment).unwrap_err().exit, Exit::Usage);
}

#[test]
fn a_template_of_ones_own_is_used_and_explained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.jinja");
    let with = |text: &str| {
        std::fs::write(&path, text).unwrap();
        render(&Site { template: Some(path.clone()), ..site() })
    };
    assert_eq!(with("{{ run }} {{ run_dir }}\n").unwrap(), "n /runs/n\n");
    let failure = with("{{ no_such_value }}").unwrap_err();
    assert_eq!(failure.exit, Exit::Usage);
    assert!(failure.to_string().contains("the template of the batch script is wrong"), "{failure}");
}
