//! The program as a shell starts it, and a directory for its files.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fence_config::{self as config, Config, Source, Warnings};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_fence-daemon");

/// A directory of its own, removed in the end.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir_in(std::env::temp_dir().canonicalize().unwrap()).unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Names and contents of all that is in it; of a link where it leads.
    pub(crate) fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let entry = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.unwrap();
            let content = match std::fs::read_link(entry.path()) {
                Ok(target) => target.into_os_string().into_encoded_bytes(),
                Err(_) => std::fs::read(entry.path()).unwrap_or_default(),
            };
            (entry.file_name().into_string().unwrap(), content)
        };
        self.0.path().read_dir().unwrap().map(entry).collect()
    }
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// Runs a command with this on its standard input.
pub(crate) fn feed(command: &mut Command, input: &str) -> Run {
    let command = command.env_remove("RUST_LOG").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // One that does not want all of it may be gone already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap().into()
}

/// `fence-daemon ARGUMENTS -f FILE`, with answers.
pub(crate) fn run(arguments: &[&str], file: &Path, answers: &str) -> Run {
    feed(Command::new(PROGRAM).args(arguments).arg("-f").arg(file), answers)
}

/// What the daemon understands of a file.
pub(crate) fn parse(text: &str) -> (Config, Warnings) {
    config::parse(&Source::new(Path::new("file"), text.as_bytes()), Warnings::default())
        .unwrap_or_else(|error| panic!("{}\n{text}", error.render(false)))
}

pub(crate) fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o7777
}
