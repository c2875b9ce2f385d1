//! The `vublk` program: parse, dispatch, print the error chain, exit.

fn main() -> std::process::ExitCode {
    vublk::cli::main()
}
