//! `nemotron bench`: what it reports, not how fast it is.

use super::support::{finish, nemotron};

#[test]
fn bench_reports_every_figure() {
    let home = tempfile::tempdir().unwrap();
    let arguments = [
        "bench",
        "--model",
        "builtin",
        "--json",
        "--threads",
        "1",
        "--prompt-tokens",
        "64",
        "--batch",
        "1",
        "--batch",
        "3",
    ];
    let (code, stdout, stderr) = finish(nemotron(home.path()).args(arguments));
    assert_eq!(code, 0, "{stderr}");
    let measured: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(measured["schema"], 1);
    for path in [
        "/start_to_ready_s",
        "/load_s",
        "/rss_mb",
        "/prefill/64",
        "/decode/1",
        "/decode/3",
        "/ceilings/read_gb_s",
        "/ceilings/peak_gflop_s",
    ] {
        assert!(
            measured.pointer(path).and_then(serde_json::Value::as_f64).is_some_and(|figure| figure > 0.0),
            "{path}"
        );
    }
}
