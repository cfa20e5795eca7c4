//! The archive that a kernel takes its first file system from, and what programs need to run there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::debian::Kernel;
use crate::tools;

/// The shared libraries of a program and its loader, by the paths where the loader looks for them.
pub fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let listed = tools::output("ldd", &[&program.to_string_lossy()], Path::new("/"))?;
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(listed.lines().filter_map(path).collect())
}

/// A cpio archive of the kernel's kind ("newc").
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // Magic, inode, mode, owner, group, links, time, size, four device numbers, name size, no
        // checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A directory and those above it, each once.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
        self.directories.insert(path.to_owned());
        self.entry(path, 0o040_755, b"");
    }

    /// A file, and the directories above it.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        let path = path.trim_start_matches('/');
        if let Some((directory, _)) = path.rsplit_once('/') {
            self.directory(directory);
        }
        self.entry(path, 0o100_000 | permissions, content);
    }

    /// A file of the host's.
    pub fn copy(&mut self, from: &Path, path: &str, permissions: u32) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("reading {} for a guest", from.display()))?;
        self.file(path, permissions, &content);
        Ok(())
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, to: &str) {
        let path = path.trim_start_matches('/');
        if let Some((directory, _)) = path.rsplit_once('/') {
            self.directory(directory);
        }
        self.entry(path, 0o120_777, to.as_bytes());
    }

    /// Programs of the host's with all their libraries, each at its own path.
    pub fn programs(&mut self, programs: &[PathBuf]) -> Result<()> {
        let mut files = BTreeSet::new();
        for program in programs {
            self.copy(program, &program.to_string_lossy(), 0o755)?;
            files.extend(libraries(program)?);
        }
        for library in files {
            self.copy(&library, &library.to_string_lossy(), 0o755)?;
        }
        Ok(())
    }

    /// Modules of a kernel, in `/modules`: their files' names, in this order.
    pub fn modules<'a>(
        &mut self,
        kernel: &Kernel,
        modules: impl IntoIterator<Item = &'a &'a str>,
    ) -> Result<Vec<&'a str>> {
        let add = |module: &&'a str| {
            let name = module.rsplit('/').next().unwrap_or(module);
            self.file(&format!("/modules/{name}"), 0o644, &kernel.module(module)?);
            Ok(name)
        };
        modules.into_iter().map(add).collect()
    }

    /// The archive's bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_reads() {
        let mut archive = Archive::default();
        archive.file("/etc/deep/file", 0o600, b"hello");
        archive.file("/etc/other", 0o644, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<_> = ["etc\0", "etc/deep\0", "etc/deep/file\0", "etc/other\0", "TRAILER!!!\0"].into();
        let mut at = 0;
        for name in names {
            at += bytes[at..].windows(name.len()).position(|window| window == name.as_bytes()).expect(name);
        }
        assert_eq!(bytes.windows(6).filter(|window| window == b"070701").count(), 5);
    }
}
