//! All the other tests again with a library that is built with the sanitizers of addresses and of undefined behaviour.

use std::process::Command;

use super::device::{LIBRARY, build, sources};

#[test]
fn nothing_is_accessed_outside_of_its_memory() {
    if std::env::var_os(LIBRARY).is_some() {
        return;
    }
    let library =
        build("sanitized", &sources(), &["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]);
    // The sanitizers look for what they watch when the process starts, C++ exceptions too.
    let runtimes = ["libasan.so", "libstdc++.so"].map(|name| {
        let path = Command::new("g++").arg(format!("-print-file-name={name}")).output().unwrap().stdout;
        String::from_utf8(path).unwrap().trim().to_owned()
    });
    let output = Command::new(std::env::current_exe().unwrap())
        .env("LD_PRELOAD", runtimes.join(" "))
        .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
        .env(LIBRARY, &library)
        .output()
        .unwrap();
    std::fs::remove_file(library).unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    assert!(text.contains("test result: ok"), "{text}");
}
