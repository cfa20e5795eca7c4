//! A state directory that other users can write to: the daemon does not start, and shows the
//! remedy.

#[cfg(test)]
mod refused {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    /// Far longer than a start takes.
    const LIMIT: Duration = Duration::from_secs(20);

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let key = folder.path().join("key");
            fs::write(&key, [7; 512]).unwrap();
            fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
            Self(folder)
        }

        /// Starts the daemon with this state directory and returns its exit code and output. A
        /// daemon that starts would wait, as the interface does not exist.
        fn start(&self, state: &Path) -> (Option<i32>, String) {
            let config = self.0.path().join("conf");
            let text = format!(
                "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; state_directory = \"{}\"; }}\n\
                 listeners {{ multicast {{ interface = \"nosuch0\"; key_file = \"{}\"; }} }}\n\
                 backends {{ libvirt {{ uri = \"test:///default\"; }} }}\n",
                state.display(),
                self.0.path().join("key").display()
            );
            fs::write(&config, text).unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_fence-daemon"));
            command.arg("-F").arg("-f").arg(&config).arg("-p").arg(self.0.path().join("pid"));
            let mut daemon = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let begun = Instant::now();
            while daemon.try_wait().unwrap().is_none() && begun.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(10));
            }
            // The daemon has ended, or the test has failed.
            let _ = daemon.kill();
            let output = daemon.wait_with_output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        }

        fn is_refused(&self, state: &Path, wanted: &[&str]) {
            let (code, said) = self.start(state);
            assert_eq!(code, Some(255), "the daemon must not start: {said}");
            for wanted in wanted.iter().chain(&[state.to_str().unwrap(), "mend it with"]) {
                assert!(said.contains(wanted), "{wanted}: {said}");
            }
        }
    }

    #[test]
    fn a_directory_that_others_can_write_to() {
        let folder = Folder::new();
        let state = folder.0.path().join("state");
        fs::create_dir(&state).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
        folder.is_refused(&state, &["is writable for others", "mode 0777"]);
    }

    #[test]
    fn a_directory_that_is_a_link() {
        let folder = Folder::new();
        let (real, state) = (folder.0.path().join("real"), folder.0.path().join("state"));
        fs::create_dir(&real).unwrap();
        symlink(&real, &state).unwrap();
        folder.is_refused(&state, &["is a symbolic link"]);
    }

    #[test]
    fn a_restart_that_others_could_have_written() {
        let folder = Folder::new();
        let state = folder.0.path().join("state");
        fs::create_dir(&state).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
        let file = state.join("x.restart");
        fs::write(&file, "{}").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        folder.is_refused(&state, &["x.restart", "mode 0666"]);
    }
}
