//! Runs the system's programs with a time limit, and kills those that exceed it.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Where programs are looked for besides `PATH`: a user's `PATH` often lacks the administrator's
/// directories.
const SYSTEM: [&str; 4] = ["/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin"];
/// The interval between two looks for the program's end.
const LOOK: Duration = Duration::from_millis(10);
/// The most output that is read, in bytes.
const OUTPUT_MAX: u64 = 64 << 20;

/// A program's output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Its exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Said {
    /// The first line of standard error, or else of standard output.
    #[must_use]
    pub fn first_line(&self) -> &str {
        let lines = self.stderr.lines().chain(self.stdout.lines());
        lines.map(str::trim).find(|line| !line.is_empty()).unwrap_or("without a word")
    }
}

/// Why a program gave no output.
#[derive(Debug, thiserror::Error)]
pub enum Silence {
    /// The program is not installed.
    #[error("there is no program `{0}`")]
    Missing(String),
    /// The program exceeded its time limit.
    #[error("`{program}` has not ended within {} s", limit.as_secs())]
    Overdue {
        /// Its name.
        program: String,
        /// Its time limit.
        limit: Duration,
    },
    /// The program cannot be run.
    #[error("cannot run `{program}`: {error}")]
    Broken {
        /// Its name.
        program: String,
        /// The system's error.
        #[source]
        error: io::Error,
    },
}

/// The file of a program, if it is installed.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(SYSTEM.iter().map(PathBuf::from));
    places.map(|place| place.join(program)).find(|file| file.is_file())
}

/// Runs a program to its end.
///
/// # Errors
/// See [`Silence`]. An exit status other than 0 is no error.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A], limit: Duration) -> Result<Said, Silence> {
    run_with(program, arguments, &[], limit)
}

/// As [`run`], with additional environment variables.
///
/// # Errors
/// As [`run`].
pub fn run_with<A: AsRef<OsStr>>(
    program: &str,
    arguments: &[A],
    environment: &[(&str, &str)],
    limit: Duration,
) -> Result<Said, Silence> {
    let file = find(program).ok_or_else(|| Silence::Missing(program.to_owned()))?;
    let broken = |error| Silence::Broken { program: program.to_owned(), error };
    let mut command = Command::new(file);
    command.args(arguments).env("LC_ALL", "C").envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(broken)?;
    // Threads read the output: a full pipe would keep the program from ending.
    let stdout = child.stdout.take().map(|stream| thread::spawn(move || all_of(stream)));
    let stderr = child.stderr.take().map(|stream| thread::spawn(move || all_of(stream)));
    let ended = wait(&mut child, limit).map_err(broken)?;
    let Some(code) = ended else {
        return Err(Silence::Overdue { program: program.to_owned(), limit });
    };
    let text =
        |reader: Option<thread::JoinHandle<String>>| reader.and_then(|reader| reader.join().ok()).unwrap_or_default();
    Ok(Said { code, stdout: text(stdout), stderr: text(stderr) })
}

/// Waits for the end; `None` if the program had to be killed.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<Option<i32>>> {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code()));
        }
        if Instant::now() > until {
            // This fails only if the program has just ended.
            let _ = child.kill();
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

fn all_of(stream: impl Read) -> String {
    let mut bytes = Vec::new();
    // What was read before an error still counts.
    let _ = stream.take(OUTPUT_MAX).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    #[test]
    fn a_programs_whole_output_is_read() {
        let said = run("sh", &["-c", "echo out; echo err >&2; exit 3"], SOON).unwrap();
        assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (Some(3), "out\n", "err\n"));
        assert_eq!(said.first_line(), "err");
        let much = run("sh", &["-c", "yes | head -c 1000000"], SOON).unwrap();
        assert_eq!(much.stdout.len(), 1_000_000);
    }

    #[test]
    fn a_hanging_or_missing_program_gives_no_output() {
        let hung = run("sleep", &["600"], Duration::from_millis(50)).unwrap_err();
        assert!(matches!(hung, Silence::Overdue { .. }), "{hung}");
        let missing = run("no-such-program", &["x"], SOON).unwrap_err();
        assert!(matches!(missing, Silence::Missing(_)), "{missing}");
    }
}
