//! Reads the configuration's bytes from a file or a pipe (`-f <(generate)`). Size and time are
//! bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::MAX_SIZE;
use super::error::ConfigError;
use super::position::Source;
use super::warning::{Doubt, Warnings};

/// How long a pipe may take: a FIFO without a writer must not block the start forever.
const PIPE_WITHIN: Duration = Duration::from_secs(5);

/// Reads a configuration file without parsing it. The warnings are about the file itself.
///
/// # Errors
/// The file cannot be read, or is too large for a configuration.
pub fn read(path: &Path) -> Result<(Vec<u8>, Warnings), ConfigError> {
    let unreadable = |error| ConfigError::Unreadable { path: path.to_owned(), error };
    // Without O_NONBLOCK opening a FIFO waits for a writer.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let mut file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(unreadable)?;
    let about = file.metadata().map_err(unreadable)?;
    if about.is_dir() {
        return Err(unreadable(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let deadline =
        (about.file_type().is_fifo() || about.file_type().is_char_device()).then(|| Instant::now() + PIPE_WITHIN);

    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    // Reads one byte more than allowed: that tells a file that just fits from one that is too
    // large.
    while bytes.len() <= MAX_SIZE {
        if let Some(deadline) = deadline {
            wait_for_bytes(&file, deadline).map_err(unreadable)?;
        }
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend_from_slice(buffer.get(..read).unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
    if bytes.len() > MAX_SIZE {
        return Err(ConfigError::TooLarge { place: Source::new(path, &bytes).place(&(MAX_SIZE..MAX_SIZE)) });
    }
    let mut warnings = Warnings::default();
    if about.is_file() && about.mode() & 0o022 != 0 {
        warnings.push(None, Doubt::ConfigWritable { path: path.to_owned(), mode: about.mode() & 0o7777 });
    }
    Ok((bytes, warnings))
}

/// Returns once there is something to read, or the end of the file.
fn wait_for_bytes(file: &File, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it is a pipe, and did not end within {} s", PIPE_WITHIN.as_secs()),
                ));
            }
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use tempfile::tempdir;

    #[test]
    fn a_pipe_is_read_to_its_end() {
        let dir = tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let writer = std::thread::spawn({
            let fifo = fifo.clone();
            move || {
                let mut pipe = OpenOptions::new().write(true).open(fifo).unwrap();
                for part in ["fence_virtd", " { ", "}"] {
                    pipe.write_all(part.as_bytes()).unwrap();
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        let (bytes, warnings) = read(&fifo).unwrap();
        writer.join().unwrap();
        assert_eq!((bytes.as_slice(), warnings.is_empty()), (&b"fence_virtd { }"[..], true));
        assert_eq!(read(Path::new("/dev/null")).unwrap().0, b"");
    }

    #[test]
    fn an_endless_program_is_stopped() {
        let Err(ConfigError::TooLarge { place }) = read(Path::new("/dev/zero")) else { panic!("endless") };
        assert_eq!(place.to_string(), format!("/dev/zero:1:{}", MAX_SIZE + 1));
        let dir = tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let Err(error @ ConfigError::Unreadable { .. }) = read(&fifo) else { panic!("nobody wrote") };
        assert!(error.to_string().contains("it is a pipe"), "{error}");
    }
}
