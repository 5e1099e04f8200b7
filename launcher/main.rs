fn main() -> std::process::ExitCode {
    nemotron::main()
}
