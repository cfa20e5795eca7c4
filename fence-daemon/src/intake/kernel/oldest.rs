//! Which kernels the program is for.

use super::Error;

/// The oldest kernel that has all that the program uses. The exchange instruction and global
/// functions with pointers came with 5.12.
///
/// The daemon still tries any kernel, since distributions backport BPF to older ones. The number
/// only explains a failure.
pub const OLDEST: (u32, u32) = (5, 12);

impl Error {
    /// For the log line of an error: whether the running kernel is too old.
    #[must_use]
    pub fn remark(&self) -> Option<String> {
        let release = rustix::system::uname();
        self.remark_on(&release.release().to_string_lossy())
    }

    fn remark_on(&self, release: &str) -> Option<String> {
        if let Self::Earlier(error) = self {
            return error.remark_on(release);
        }
        if !matches!(self, Self::Object(_) | Self::Refused { .. } | Self::Program(_)) {
            return None;
        }
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
        let version = (numbers.next()?, numbers.next()?);
        let (major, minor) = OLDEST;
        (version < OLDEST).then(|| {
            format!("this is Linux {release}, and the program needs {major}.{minor} or newer: nothing is wrong, only slower under a flood")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_old_kernel_explains_a_refusal() {
        let refused = || Error::Refused {
            reason: "unknown opcode db".to_owned(),
            source: std::io::Error::from_raw_os_error(nix::libc::EINVAL),
        };
        for old in ["5.11.20", "5.10.0-33-cloud-amd64", "4.18.0-553.el8_10.x86_64"] {
            let said = refused().remark_on(old).unwrap();
            assert!(said.contains(&format!("this is Linux {old}")) && said.contains("5.12 or newer"), "{said}");
        }
        for other in ["5.12.0", "5.12", "6.1.0-56-cloud-amd64", "6.12", "10.0.1", "", "strange", "5"] {
            assert_eq!(refused().remark_on(other), None, "{other}");
        }
        assert_eq!(Error::Missing("a map").remark_on("4.4.0"), None);
    }
}
