//! The state directory, and the only way to open what is in it: files ([`mod@file`]), the control
//! socket ([`socket`]) and, elsewhere, the PID file ([`pid_file`]).
//!
//! Its files decide what this daemon does as root: which domains it starts, which requests it
//! rejects, what it believes of a silent URI. So nobody else may be able to write there. Each open
//! checks:
//!
//! - **The directory** and each directory above it: no symbolic link of another user on the way,
//!   and the directory itself is no link. Root or the daemon's user owns it, and others cannot
//!   write to it. (A sticky directory above it, such as `/tmp`, may be writable: nobody can rename
//!   there what belongs to another user.)
//! - **Each file**: a regular file of one name, with the same owner, not writable for others. It is
//!   opened without following links.
//!
//! If a check fails the daemon does not start (exit code 255), and names the remedy. A directory
//! that cannot be created or written at all prevents no fencing. So the daemon then serves, and
//! logs what is lost.

pub mod file;
pub mod pid_file;
pub mod socket;

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::{O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK};

/// Write permission of a group and of everybody.
const OTHERS_WRITE: u32 = 0o022;
/// The sticky bit: in such a directory only a file's owner can rename or remove it.
const STICKY: u32 = 0o1000;

/// Why the state directory, or a file in it, is not used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Somebody else could write there, or has.
    #[error("{path} {what} (owner {uid}, mode {mode:04o}): who can write there decides what this daemon does as root; mend it with `{remedy}`", path = path.display(), mode = mode & 0o7777)]
    Unsafe {
        /// The directory, the file, or a directory or link on the way there.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
        /// Its owner.
        uid: u32,
        /// Its mode, with the file's type.
        mode: u32,
        /// A command that mends it.
        remedy: String,
    },
    /// It cannot be made, opened or looked at.
    #[error("cannot {what} {path}: {error} (is the `state_directory` on a file system that can be written, and root's?)", path = path.display())]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
}

impl StateError {
    /// Whether this is a danger, so that the daemon must not start.
    #[must_use]
    pub fn is_unsafe(&self) -> bool {
        matches!(self, Self::Unsafe { .. })
    }

    fn kernel(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Kernel { what, path, error }
    }
}

impl From<StateError> for io::Error {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Kernel { error, .. } => error,
            StateError::Unsafe { .. } => Self::other(error),
        }
    }
}

/// Opens the directory, and creates it if need be, for its owner alone.
///
/// # Errors
/// It is unsafe, or cannot be opened or created.
pub fn directory(path: &Path) -> Result<File, StateError> {
    // Before it is created: nothing is created below another user's directory.
    way(path)?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    let about = fs::symlink_metadata(path);
    if let Ok(about) = &about
        && about.is_symlink()
    {
        return Err(refused(path, about, "is a symbolic link", format!("rm {}", path.display())));
    }
    made.map_err(StateError::kernel("make the directory", path))?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    let directory = options.open(path).map_err(StateError::kernel("open the directory", path))?;
    let about = directory.metadata().map_err(StateError::kernel("look at", path))?;
    owned(path, &about)?;
    Ok(directory)
}

/// Opens a file of the state directory with these options, and only a file that nobody else can
/// write.
///
/// # Errors
/// It or the directory is unsafe, or cannot be opened.
fn open(directory: &Path, name: &str, options: &mut OpenOptions) -> Result<File, StateError> {
    self::directory(directory)?;
    let path = directory.join(name);
    let kernel = |what| StateError::kernel(what, &path);
    // Opening a FIFO must not hang.
    options.mode(0o600).custom_flags(O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(error) => {
            // The file's kind may explain more than the kernel's "too many levels of symbolic
            // links".
            if let Ok(about) = fs::symlink_metadata(&path) {
                plain(&path, &about)?;
            }
            return Err(kernel("open")(error));
        }
    };
    plain(&path, &file.metadata().map_err(kernel("look at"))?)?;
    Ok(file)
}

/// Checks the directory, if it exists, and all files that this daemon or an earlier one may have
/// put there. Creates nothing.
///
/// # Errors
/// The first thing that is unsafe; or a check cannot be made.
pub fn look(path: &Path) -> Result<(), StateError> {
    way(path)?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StateError::kernel("look at", path)(error)),
        Ok(about) if about.is_symlink() => {
            return Err(refused(path, &about, "is a symbolic link", format!("rm {}", path.display())));
        }
        Ok(about) => owned(path, &about)?,
    }
    let entries = fs::read_dir(path).map_err(StateError::kernel("read the directory", path))?;
    for entry in entries.flatten() {
        let file = entry.path();
        // What goes away meanwhile harms nobody.
        let Ok(about) = fs::symlink_metadata(&file) else { continue };
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ends = |end: &str| Path::new(&*name).extension().is_some_and(|extension| extension == end);
        if matches!(&*name, "claims" | "replays" | "trusted" | "last-known")
            || name.starts_with("left-behind")
            || matches!(&*name, "history" | "history.1")
            || ends("restart")
            || ends("draft")
        {
            plain(&file, &about)?;
        } else if ends("sock") && about.file_type().is_socket() {
            owned(&file, &about)?;
        }
    }
    Ok(())
}

/// Checks each directory above this one: its owner decides what is below.
fn way(path: &Path) -> Result<(), StateError> {
    for above in path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()) {
        let Ok(link) = fs::symlink_metadata(above) else { continue };
        if link.is_symlink() && !is_trusted(link.uid()) {
            let remedy = format!("rm {}", above.display());
            return Err(refused(above, &link, "is a symbolic link of another user", remedy));
        }
        let about = fs::metadata(above).map_err(StateError::kernel("look at", above))?;
        if !is_trusted(about.uid()) {
            let remedy = format!("chown root: {}", above.display());
            return Err(refused(above, &about, "belongs to another user", remedy));
        }
        if about.mode() & OTHERS_WRITE != 0 && about.mode() & STICKY == 0 {
            let remedy = format!("chmod go-w {}", above.display());
            return Err(refused(above, &about, "is writable for others", remedy));
        }
    }
    Ok(())
}

/// Checks for a regular file, of one name, that nobody else can write.
fn plain(path: &Path, about: &Metadata) -> Result<(), StateError> {
    let remove = || format!("rm -r {}", path.display());
    if about.is_symlink() {
        return Err(refused(path, about, "is a symbolic link", remove()));
    }
    if !about.is_file() {
        return Err(refused(path, about, "is no regular file", remove()));
    }
    if about.nlink() > 1 {
        return Err(refused(path, about, "has another name as well", remove()));
    }
    // A new owner does not make another user's content safe, so the remedy is to remove it.
    if !is_trusted(about.uid()) {
        return Err(refused(path, about, "belongs to another user", remove()));
    }
    owned(path, about)
}

/// Owned by us and writable for nobody else.
fn owned(path: &Path, about: &Metadata) -> Result<(), StateError> {
    let shown = path.display();
    if !is_trusted(about.uid()) {
        let remedy = format!("rm -r {shown}");
        return Err(refused(path, about, "belongs to another user", remedy));
    }
    if about.mode() & OTHERS_WRITE != 0 && !about.file_type().is_socket() {
        let remedy = if about.is_dir() { format!("rm -r {shown}") } else { format!("rm {shown}") };
        return Err(refused(path, about, "is writable for others", remedy));
    }
    Ok(())
}

/// Root, or the daemon's own user.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

fn refused(path: &Path, about: &Metadata, what: &'static str, remedy: String) -> StateError {
    StateError::Unsafe { path: path.to_owned(), what, uid: about.uid(), mode: about.mode(), remedy }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
    use tempfile::tempdir;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// What an error says, of something unsafe.
    fn unsafe_for<T: std::fmt::Debug>(result: Result<T, StateError>) -> String {
        let error = result.unwrap_err();
        assert!(error.is_unsafe(), "{error}");
        error.to_string()
    }

    #[test]
    fn a_new_directory_is_for_its_owner_alone() {
        let scratch = tempdir().unwrap();
        let path = scratch.path().join("a/b");
        directory(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
        let mut options = OpenOptions::new();
        open(&path, "claims", options.append(true).create(true)).unwrap();
        assert_eq!(fs::metadata(path.join("claims")).unwrap().mode() & 0o7777, 0o600);
        look(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_control_is_refused() {
        let scratch = tempdir().unwrap();
        let path = scratch.path().join("state");
        directory(&path).unwrap();
        for bad in [0o777, 0o770, 0o720, 0o1777] {
            mode(&path, bad);
            let said = unsafe_for(look(&path));
            assert!(said.contains(&format!("mode {bad:04o}")) && said.contains("rm -r /"), "{said}");
        }
        mode(&path, 0o755);
        look(&path).unwrap();
        let link = scratch.path().join("link");
        symlink(&path, &link).unwrap();
        let said = unsafe_for(directory(&link));
        assert!(said.contains("is a symbolic link") && said.contains("`rm /"), "{said}");
        symlink("/nowhere", scratch.path().join("dangling")).unwrap();
        unsafe_for(directory(&scratch.path().join("dangling")));
        // The check covers the directories above too, but not a sticky one such as /tmp.
        mode(scratch.path(), 0o777);
        let said = unsafe_for(directory(&path));
        assert!(said.contains("chmod go-w"), "{said}");
        mode(scratch.path(), 0o1777);
        directory(&path).unwrap();
    }

    #[test]
    fn a_file_that_another_could_have_written_is_refused() {
        let scratch = tempdir().unwrap();
        let (path, precious) = (scratch.path().join("claims"), scratch.path().join("precious"));
        let read = || open(scratch.path(), "claims", OpenOptions::new().read(true).write(true).create(true));
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, &path).unwrap();
        assert!(unsafe_for(read()).contains("symbolic link"));
        fs::remove_file(&path).unwrap();
        fs::hard_link(&precious, &path).unwrap();
        assert!(unsafe_for(read()).contains("another name"));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(unsafe_for(read()).contains("no regular file"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(unsafe_for(read()).contains("no regular file"));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "").unwrap();
        mode(&path, 0o666);
        assert!(unsafe_for(read()).contains("mode 0666"));
        assert!(unsafe_for(look(scratch.path())).contains("mode 0666"));
        mode(&path, 0o600);
        read().unwrap();
        assert_eq!(fs::read_to_string(precious).unwrap(), "precious");
    }

    #[test]
    fn another_users_files_are_refused() {
        if !nix::unistd::geteuid().is_root() {
            // Nobody else can give a file away.
            return;
        }
        let scratch = tempdir().unwrap();
        let path = scratch.path().join("state");
        directory(&path).unwrap();
        for name in ["a.restart", "replays", "last-known"] {
            let file = path.join(name);
            fs::write(&file, "{}").unwrap();
            mode(&file, 0o600);
            chown(&file, Some(12345), None).unwrap();
            let said = unsafe_for(look(&path));
            assert!(said.contains("owner 12345") && said.contains("rm -r "), "{said}");
            fs::remove_file(&file).unwrap();
        }
        fs::write(path.join("other"), "").unwrap();
        chown(path.join("other"), Some(12345), None).unwrap();
        look(&path).unwrap();
        chown(&path, Some(12345), None).unwrap();
        assert!(unsafe_for(look(&path)).contains("owner 12345"));
        chown(&path, Some(0), None).unwrap();
        // A link on the way that another user can redirect.
        let link = scratch.path().join("link");
        symlink(scratch.path(), &link).unwrap();
        directory(&link.join("state")).unwrap();
        lchown(&link, Some(12345), None).unwrap();
        assert!(unsafe_for(directory(&link.join("state"))).contains("symbolic link of another user"));
    }

    #[test]
    fn a_missing_directory_is_not_unsafe() {
        for nowhere in ["/proc/nowhere", "/proc/version/below"] {
            assert!(!directory(Path::new(nowhere)).unwrap_err().is_unsafe());
        }
    }
}
