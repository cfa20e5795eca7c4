//! Two executables read one command line: the daemon its own options, the commands' everything.

#[cfg(test)]
mod read_twice {
    use std::collections::BTreeSet;
    use std::ffi::OsString;
    use std::fs;
    use std::os::unix::ffi::OsStringExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::Command;

    use fence_client::cli::Cli;
    use fence_common::exit::{EXIT_START, EXIT_USAGE};
    use fence_daemon::commands;
    use fence_daemon::options::DaemonOptions;
    use object::{Object as _, ObjectSymbol as _};
    use proptest::prelude::*;

    const DAEMON: &str = env!("CARGO_BIN_EXE_fence-daemon");
    const COMMANDS: &str = env!("CARGO_BIN_EXE_fence-daemon-commands");

    /// What the commands' executable reads as options of the daemon. It has the last word.
    fn by_the_commands(arguments: &[OsString]) -> Option<DaemonOptions> {
        let name = OsString::from("fence-daemon");
        let cli = Cli::read(std::iter::once(&name).chain(arguments)).ok()?;
        let is_daemon = cli.command.is_none() && !cli.list && !cli.configure;
        let Cli { foreground, config, debug, wait, pid_file, .. } = cli;
        is_daemon.then_some(DaemonOptions { foreground, config, debug, wait, pid_file })
    }

    fn same(arguments: &[OsString]) -> Result<(), TestCaseError> {
        let read = DaemonOptions::read(arguments.iter().cloned());
        prop_assert_eq!(read, by_the_commands(arguments), "{:?}", arguments);
        Ok(())
    }

    /// A word of a command line: mostly pieces of right ones, so that whole lines are right, too.
    fn word() -> impl Strategy<Value = OsString> {
        const BETWEEN: &[&str] = &["", "="];
        const OPTIONS: &[&str] = &[
            "-F",
            "-w",
            "-d",
            "-f",
            "-p",
            "-Fw",
            "-Fwd",
            "-wf",
            "--foreground",
            "--wait",
            "--debug",
            "--config",
            "--pidfile",
        ];
        const OTHERS: &[&str] = &[
            "-c",
            "-l",
            "-h",
            "-V",
            "--help",
            "--version",
            "--list",
            "--configure",
            "--yes",
            "--port",
            "--uri",
            "--conf",
            "--debu",
            "status",
            "doctor",
            "check-config",
            "drop-in",
            "keygen",
            "help",
            "--",
            "-",
            "",
            "-Z",
            "-=",
            "--=",
            "---",
            "-F-",
        ];
        const VALUES: &[&str] =
            &["0", "7", "007", "+3", "-0", "-5", "4294967295", "4294967296", "x", "/a", "a/b", "..", "a=b", "=", "é"];
        let attached = (prop::sample::select(OPTIONS), prop::sample::select(BETWEEN), prop::sample::select(VALUES));
        prop_oneof![
            6 => prop::sample::select(OPTIONS).prop_map(OsString::from),
            4 => prop::sample::select(VALUES).prop_map(OsString::from),
            3 => attached.prop_map(|(option, between, value)| format!("{option}{between}{value}").into()),
            1 => prop::sample::select(OTHERS).prop_map(OsString::from),
            1 => prop::collection::vec(any::<u8>(), 0..5).prop_map(|bytes| {
                // No argument of a process has a NUL.
                OsString::from_vec(bytes.into_iter().filter(|byte| *byte != 0).collect())
            }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        #[test]
        fn both_read_the_same_options(arguments in prop::collection::vec(word(), 0..6)) {
            same(&arguments)?;
        }
    }

    #[test]
    fn both_read_the_options_of_stocks_pages() {
        let mut taken = 0;
        for line in [
            "",
            "-F",
            "-d 99",
            "-d99",
            "-F -d5 -f /etc/fence_virt.conf",
            "-p /run/p",
            "-Fwd2",
            "-d1 -w -d2",
            "-w --debug=4",
        ] {
            let arguments: Vec<_> = line.split_whitespace().map(OsString::from).collect();
            same(&arguments).unwrap();
            taken += usize::from(DaemonOptions::read(arguments).is_some());
        }
        assert_eq!(taken, 9);
        let no_utf8 = ["-f".into(), OsString::from_vec(vec![0x80])];
        same(&no_utf8).unwrap();
        assert_eq!(DaemonOptions::read(no_utf8), None);
    }

    /// Whether each of these crates has a function in an executable.
    fn crates(executable: &str, names: &[&'static str]) -> BTreeSet<&'static str> {
        let bytes = fs::read(executable).unwrap();
        let file = object::File::parse(&*bytes).unwrap();
        let symbols: Vec<_> = file.symbols().filter_map(|symbol| symbol.name().ok()).collect();
        assert!(symbols.len() > 1000, "{executable} has no symbols");
        let has = |name: &&&str| symbols.iter().any(|symbol| symbol.contains(**name));
        names.iter().filter(has).copied().collect()
    }

    /// All of the daemon's own code is in its memory, and locked there.
    #[test]
    fn the_daemon_has_no_code_of_the_commands() {
        let theirs = ["clap_builder", "crossterm", "fence_client", "ratatui_core"];
        assert_eq!(crates(COMMANDS, &theirs), BTreeSet::from(theirs));
        assert_eq!(crates(DAEMON, &theirs), BTreeSet::new());
        assert_eq!(crates(DAEMON, &["fence_daemon"]).len(), 1);
    }

    /// The daemon's executable in a directory of its own, and what it says to these arguments.
    fn run(daemon: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(daemon).args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// A copy of the daemon's executable in `sbin` of a fresh directory.
    fn installed() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let daemon = folder.path().join("sbin/fence-daemon");
        fs::create_dir(folder.path().join("sbin")).unwrap();
        fs::copy(DAEMON, &daemon).unwrap();
        (folder, daemon)
    }

    #[test]
    fn the_commands_are_found_in_libexec_and_keep_their_arguments() {
        let (folder, daemon) = installed();
        let libexec = folder.path().join("libexec/fence-xdp");
        fs::create_dir_all(&libexec).unwrap();
        fs::copy(COMMANDS, libexec.join(commands::PROGRAM)).unwrap();
        let (code, stdout, _) = run(&daemon, &["-l"]);
        assert!(code == Some(0) && stdout.starts_with("Available backends:"), "{code:?} {stdout}");
        let key = folder.path().join("key");
        let made = run(&daemon, &["keygen", key.to_str().unwrap()]);
        assert!(made.0 == Some(0) && key.exists(), "{made:?}");
        // The usage has the name that was typed, and the exit code is that of wrong usage.
        let (code, _, stderr) = run(&daemon, &["-Z"]);
        assert_eq!(code, Some(EXIT_USAGE.into()));
        assert!(stderr.contains("Usage: fence-daemon "), "{stderr}");
    }

    #[test]
    fn missing_commands_are_reported_with_their_places() {
        let (folder, daemon) = installed();
        let folder = folder.path().canonicalize().unwrap();
        for arguments in [&["status"][..], &["-V"], &["-Z"]] {
            let (code, stdout, stderr) = run(&daemon, arguments);
            assert!(code == Some(EXIT_START.into()) && stdout.is_empty(), "{code:?} {stdout}");
            for place in ["sbin/fence-daemon-commands", "libexec/fence-xdp/fence-daemon-commands"] {
                assert!(stderr.contains(&folder.join(place).display().to_string()), "{stderr}");
            }
        }
        // The daemon itself needs none of it.
        let config = folder.join("none.conf");
        let (code, _, stderr) = run(&daemon, &["-F", "-f", config.to_str().unwrap()]);
        assert!(code == Some(EXIT_USAGE.into()) && stderr.contains("cannot read the configuration file"), "{stderr}");
        // One that cannot run is named.
        let there = folder.join("sbin/fence-daemon-commands");
        fs::write(&there, "").unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o600)).unwrap();
        let (code, _, stderr) = run(&daemon, &["status"]);
        assert!(code == Some(1) && stderr.contains("Permission denied"), "{stderr}");
    }

    #[test]
    fn the_commands_do_not_serve() {
        let (code, stdout, stderr) = run(Path::new(COMMANDS), &["-F"]);
        assert_eq!((code, stdout.as_str()), (Some(EXIT_USAGE.into()), ""));
        assert!(stderr.contains("start it by `fence-daemon`"), "{stderr}");
    }
}
