//! The BPF toolchain: a Rust compiler with the library's source, and bpf-linker.
//!
//! The library for the BPF target must be compiled from source. rustup has the source as component
//! `rust-src`. Debian has it in a second toolchain (`rustc-web`), which is in /usr/bin beside
//! rustup's.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The version of bpf-linker that setup installs; a later one is accepted.
pub(crate) const BPF_LINKER: Version = Version(0, 13, 0);

/// The major versions of LLVM that can build [`BPF_LINKER`].
pub(crate) const LINKER_LLVM: &[u32] = &[22, 23];

/// A version number as programs print it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl Version {
    /// The version at the start of `text`, without its suffix (`-nightly`, `+dfsg1-1`).
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let numbers = text.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut numbers = numbers.split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let mut rest = numbers.map_while(Result::ok);
        Some(Self(major, rest.next()?, rest.next().unwrap_or(0)))
    }

    /// The oldest Rust that compiles this workspace: its `rust-version`.
    pub(crate) fn minimum_rust() -> Self {
        Self::parse(env!("CARGO_PKG_RUST_VERSION")).unwrap_or(Self(1, 95, 0))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The library's source, from a toolchain's own directory.
const LIBRARY: &str = "lib/rustlib/src/rust";

/// Variables that the calling cargo has set, and that would break a build for another target with
/// another compiler.
const NOT_INHERITED: [&str; 14] = [
    "CARGO",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "MAKEFLAGS",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOCFLAGS",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// A Rust toolchain that can compile for the BPF target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// The compiler's absolute path.
    pub(crate) rustc: PathBuf,
    /// The toolchain's cargo.
    pub(crate) cargo: PathBuf,
    /// The major version of its LLVM, which bpf-linker's must equal or exceed.
    pub(crate) llvm: u32,
}

impl Toolchain {
    /// The first usable toolchain: the distribution's, the shell's, then rustup's others.
    pub(crate) fn find() -> Option<Self> {
        Self::of(Path::new("/usr/bin/rustc")).or_else(|| Self::of(Path::new("rustc"))).or_else(|| {
            let names = ask(Path::new("rustup"), &["toolchain", "list"])?;
            let mut names = names.lines().filter_map(|line| line.split_whitespace().next());
            names.find_map(|name| {
                Self::of(Path::new(ask(Path::new("rustup"), &["which", "--toolchain", name, "rustc"])?.trim()))
            })
        })
    }

    /// The toolchain of `rustc` (which may be rustup's proxy), if it is new enough and complete.
    fn of(rustc: &Path) -> Option<Self> {
        let (version, llvm) = parse_verbose_version(&ask(rustc, &["-vV"])?)?;
        let sysroot = PathBuf::from(ask(rustc, &["--print", "sysroot"])?.trim());
        let [rustc, cargo] = ["bin/rustc", "bin/cargo"].map(|program| sysroot.join(program));
        let complete =
            sysroot.join(LIBRARY).join("library/core/Cargo.toml").exists() && rustc.exists() && cargo.exists();
        (version >= Version::minimum_rust() && complete).then_some(Self { rustc, cargo, llvm })
    }

    /// The directory of the library's source.
    pub(crate) fn library(&self) -> PathBuf {
        // The compiler is `bin/rustc` there.
        self.rustc.ancestors().nth(2).unwrap_or(Path::new("/usr")).join(LIBRARY)
    }

    /// Whether this is the distribution's toolchain.
    pub(crate) fn is_system(&self) -> bool {
        self.rustc.starts_with("/usr")
    }

    /// The toolchain's cargo in directory `root`, without the environment of other toolchains, and
    /// allowed to compile the library.
    pub(crate) fn cargo(&self, root: &Path) -> Command {
        let mut cargo = Command::new(&self.cargo);
        NOT_INHERITED.iter().for_each(|name| {
            cargo.env_remove(name);
        });
        // A stable compiler rejects `-Z build-std` without this variable.
        cargo.current_dir(root).env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        cargo
    }
}

/// The LLVM version of the shell's compiler, if there is one.
pub(crate) fn default_llvm() -> Option<u32> {
    Some(parse_verbose_version(&ask(Path::new("rustc"), &["-vV"])?)?.1)
}

/// A bpf-linker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BpfLinker {
    /// The program.
    pub(crate) path: PathBuf,
    /// Its version.
    pub(crate) version: Version,
}

/// The available bpf-linker: on PATH, or in cargo's directory.
pub(crate) fn bpf_linker() -> Option<BpfLinker> {
    let at_hand = [PathBuf::from("bpf-linker"), cargo_bin().join("bpf-linker")];
    at_hand.into_iter().find_map(|path| {
        let version = Version::parse(ask(&path, &["--version"])?.strip_prefix("bpf-linker ")?)?;
        Some(BpfLinker { path, version })
    })
}

/// The directory where `cargo install` puts programs.
fn cargo_bin() -> PathBuf {
    cargo_home().join("bin")
}

/// Cargo's own directory, with the sources of all crates.
pub(crate) fn cargo_home() -> PathBuf {
    let home = env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    home.unwrap_or_else(|| PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"))
}

/// Parses the output of `rustc -vV`: version and LLVM's major version.
fn parse_verbose_version(text: &str) -> Option<(Version, u32)> {
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
    Some((Version::parse(value("release: ")?)?, Version::parse(value("LLVM version: ")?)?.0))
}

/// The standard output of a program, if it succeeds.
fn ask(program: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    NOT_INHERITED.iter().for_each(|name| {
        command.env_remove(name);
    });
    let output = command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_end_where_their_numbers_do() {
        assert_eq!(Version::parse("1.96.0+dfsg1-1~deb12u2"), Some(Version(1, 96, 0)));
        assert_eq!(Version::parse("1.98.0-nightly"), Some(Version(1, 98, 0)));
        assert_eq!(Version::parse("1.95"), Some(Version(1, 95, 0)));
        assert_eq!(Version::parse("0.13.0\n"), Some(Version(0, 13, 0)));
        for none in ["", "web", "1", ".1.2", "1.x"] {
            assert_eq!(Version::parse(none), None, "{none}");
        }
        assert!(Version(1, 100, 0) > Version(1, 96, 2));
    }

    #[test]
    fn the_compilers_llvm_is_read() {
        let text = "rustc 1.96.0 (built from a source tarball)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_verbose_version(text), Some((Version(1, 96, 0), 22)));
        assert_eq!(parse_verbose_version("rustc 1.96.0\n"), None);
    }
}
