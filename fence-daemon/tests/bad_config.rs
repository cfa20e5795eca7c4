//! Every kind of bad configuration, read by the daemon itself. It reports a located error soon,
//! exits with 255, never crashes, and prints a short report, also with a small stack.

#[cfg(test)]
mod refused {
    use std::fmt::Write as _;
    use std::io::{Read as _, Write as _};
    use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
    use std::path::{Path, PathBuf};
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use fence_config::cases::{PATH, cases};
    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::stat::Mode;

    /// Far more than a start needs (`--nocapture` prints a table): a loaded machine must not fail
    /// the test.
    const LIMIT: Duration = Duration::from_secs(20);

    /// The size from which on the daemon rejects a file unread.
    const TOO_LARGE: usize = 10 << 20;

    /// Larger than every report, in bytes.
    const REPORT_MAX: usize = 200 << 10;

    /// The size of the largest files that the daemon reads to their end, in bytes.
    const LARGE: usize = if cfg!(debug_assertions) { 1 << 20 } else { (4 << 20) - 200 };

    /// A stack too small for any recursion per level of the file, in bytes.
    const SMALL_STACK: u64 = 256 << 10;

    const GLOBAL: &str = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }\n";

    /// The result of a run of the daemon.
    struct Ended {
        code: Option<i32>,
        signal: Option<i32>,
        stderr: String,
        took: Duration,
    }

    /// A directory that is removed with the test.
    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.path(name);
            std::fs::write(&path, bytes).unwrap();
            path
        }
    }

    /// Starts the daemon with a configuration. With any mistake in it, the daemon must end by
    /// itself before it opens a socket or forks.
    fn daemon(config: &Path, folder: &Folder, stack: Option<u64>, stdin: Option<&[u8]>) -> Ended {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fence-daemon"));
        command.arg("-F").arg("-f").arg(config).arg("-p").arg(folder.path("pid"));
        command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(Stdio::piped());
        command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        if let Some(stack) = stack {
            // SAFETY: needed because only the child may get the small stack, before it becomes the
            // daemon. Sound because between fork and exec it makes one system call and touches
            // nothing that another thread may hold.
            unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_STACK, stack, stack)?)) };
        }
        let started = Instant::now();
        let mut child = command.spawn().unwrap();
        if let (Some(bytes), Some(mut pipe)) = (stdin, child.stdin.take()) {
            pipe.write_all(bytes).unwrap();
        }
        let mut pipe = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).unwrap();
            String::from_utf8(bytes).unwrap()
        });
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if started.elapsed() > LIMIT {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let took = started.elapsed();
        let stderr = stderr.join().unwrap();
        let Some(status) = status else { panic!("{} does not end within {LIMIT:?}: {stderr}", config.display()) };
        Ended { code: status.code(), signal: status.signal(), stderr, took }
    }

    /// Checks that hold for every rejected file.
    fn faults(ended: &Ended, place: Option<&str>, says: &str) -> Vec<String> {
        let Ended { code, signal, stderr, .. } = ended;
        let first = stderr.lines().find(|line| line.trim_start().starts_with("--> ")).unwrap_or_default();
        let checks = [
            ((*code, *signal) == (Some(255), None), format!("exit code {code:?}, signal {signal:?}")),
            (stderr.len() <= REPORT_MAX, format!("{} bytes of report", stderr.len())),
            (stderr.chars().all(|c| !c.is_control() || c == '\n'), "a control character".to_owned()),
            (!stderr.contains("panicked") && !stderr.contains("overflow"), "a crash".to_owned()),
            (stderr.starts_with("error: ") && stderr.contains(says), format!("nothing about {says}")),
            (place.is_none_or(|place| first.ends_with(place)), format!("not at {}", place.unwrap_or_default())),
            (place.is_none() || stderr.contains('^'), "no caret".to_owned()),
            (stderr.contains("help: "), "no remedy".to_owned()),
        ];
        checks.into_iter().filter(|(holds, _)| !holds).map(|(_, fault)| fault).collect()
    }

    fn check(title: &str, ended: &Ended, place: Option<&str>, says: &str) {
        let faults = faults(ended, place, says);
        let beginning: String = ended.stderr.chars().take(1000).collect();
        assert!(faults.is_empty(), "{title}: {}: {beginning}", faults.join(", "));
    }

    fn table(rows: &mut [(String, Duration, usize)]) {
        rows.sort_by_key(|(_, took, _)| std::cmp::Reverse(*took));
        let mut text = String::from("the slowest of them, with the bytes of their reports:\n");
        for (title, took, len) in rows.iter().take(12) {
            let _ = writeln!(text, "  {title:<44} {:>7.1} ms {len:>7}", took.as_secs_f64() * 1000.0);
        }
        eprint!("{text}");
    }

    /// Files that the table cannot hold: each with its title, the position of the first error, and
    /// words of the message.
    fn made() -> Vec<(&'static str, Vec<u8>, &'static str, &'static str)> {
        let program = std::fs::read(env!("CARGO_BIN_EXE_fence-daemon")).unwrap();
        let port = format!("{GLOBAL}listeners {{ multicast {{\nport = \"{}\";\n}} }}\n", "9".repeat(5000));
        vec![
            ("an ELF file", program[..4096].to_vec(), ":1:1", "0x7f"),
            ("nothing but NUL bytes", vec![0; 4096], ":1:1", "0x00"),
            ("deep nesting", [b"a { ".repeat(17), b"} ".repeat(17)].concat(), ":1:65", "nested more than 16 deep"),
            ("a huge port", port.into_bytes(), ":3:8", "no port number"),
        ]
    }

    /// The same for files of megabytes: first those that are rejected for their size alone.
    fn sizes() -> Vec<(&'static str, Vec<u8>, &'static str, &'static str)> {
        let large = ":1:4194305";
        let garbage = |pattern: &[u8]| pattern.repeat(TOO_LARGE / pattern.len());
        let much = |head: &str, pattern: &str, tail: &str| {
            let times = (LARGE - head.len() - tail.len()) / pattern.len();
            [head, &pattern.repeat(times), tail].concat().into_bytes()
        };
        let group = format!("{} groups{{group{{uuid=\"a\";", GLOBAL.trim());
        vec![
            ("10 MB of x", garbage(b"x"), large, "is larger than"),
            ("10 MB of NUL bytes", garbage(b"\0"), large, "is larger than"),
            ("10 MB of {", garbage(b"{"), large, "is larger than"),
            ("10 MB of \"", garbage(b"\""), large, "is larger than"),
            ("10 MB of lines", garbage(b"x = \"1\";\n"), ":466034:8", "is larger than"),
            ("much x", much("", "x", ""), ":1:1", "neither `=` nor `{`"),
            ("much {", much("", "{", ""), ":1:1", "found `{`"),
            ("much \"", much("", "\"", ""), ":1:1", "found `\"`"),
            ("much a{", much("", "a{", ""), ":1:33", "nested more than 16 deep"),
            ("much a=\"1\"{", much("", "a=\"1\"{", ""), ":1:97", "nested more than 16 deep"),
            ("much x=\"", much("", "x=\"", ""), ":1:7", "no `;`"),
            ("many comments", much("", "# comment\n", ""), ":1:1", "configures nothing"),
            ("one long comment", much("", "#", ""), ":1:1", "configures nothing"),
            ("many line ends", much("", "\n", ""), ":1:1", "configures nothing"),
            ("many bytes above 127", vec![0xfe; LARGE], ":1:1", "not UTF-8"),
            ("a long value that is not closed", much("x = \"", "y", ""), ":1:5", "no closing quote"),
            ("a long name", much("", "é", " { }"), ":1:1", "names no listener"),
            ("many empty sections", much("", "a{}", "z{}"), ":1:1", "names no listener"),
            ("many unknown keys on a line", much("", "portt=\"1\";", ""), ":1:1", "names no listener"),
            ("many misspelled sections on a line", much("", "lissteners{}", ""), ":1:1", "names no listener"),
            ("many misspelled groups on a line", much("", "grousp{}", ""), ":1:1", "does not restrict"),
            ("many wrong addresses on a line", much(&group, "ip=\"1\";", "}}"), ":1:87", "no IP address"),
            (
                "many ports, the last one wrong",
                much("listeners{multicast{", "port=\"1\";", "port=\"0\";}}"),
                ":1:1",
                "names no listener",
            ),
        ]
    }

    #[test]
    fn every_mistake_is_reported_with_its_place_and_exits_255() {
        let folder = Folder::new();
        let (mut rows, mut broken) = (Vec::new(), Vec::new());
        for case in cases().filter(|case| case.says.starts_with("error: ")) {
            let config = folder.write("fence_virt.conf", &case.bytes());
            let ended = daemon(&config, &folder, Some(SMALL_STACK), None);
            let expected = case.says.replace(PATH, &config.display().to_string());
            let mut faults = faults(&ended, Some(""), "");
            if ended.stderr.trim_end() != expected {
                faults.push(format!("not the table's text, {expected}\nbut"));
            }
            broken.extend(faults.iter().map(|fault| format!("{}: {fault}: {}\n", case.title, ended.stderr)));
            rows.push((case.title.to_owned(), ended.took, ended.stderr.len()));
        }
        assert!(rows.len() > 60, "only {} rows of the table are mistakes", rows.len());
        for (title, bytes, place, says) in made().into_iter().chain(sizes()) {
            let config = folder.write("fence_virt.conf", &bytes);
            let ended = daemon(&config, &folder, Some(SMALL_STACK), None);
            for fault in faults(&ended, Some(&format!("{}{place}", config.display())), says) {
                let beginning: String = ended.stderr.chars().take(300).collect();
                broken.push(format!("{title}: {fault}: {beginning}\n"));
            }
            rows.push((title.to_owned(), ended.took, ended.stderr.len()));
        }
        table(&mut rows);
        assert!(broken.is_empty(), "{}", broken.concat());
    }

    /// The largest files that are right, and ones that only deserve warnings: the key ends the
    /// start, with the warnings beside it.
    #[test]
    fn large_files_that_are_right_are_read_to_their_end() {
        let folder = Folder::new();
        let mut rows = Vec::new();
        let key =
            format!("{GLOBAL}listeners {{ multicast {{ key_file = \"{}\"; }} }}\n", folder.path("none").display());
        let group = "group { ip = \"192.168.122.11\"; uuid = \"4417ce60-1b43-4d3a-8f0e-95d6c2f0e0b1\"; }\n";
        let much = |head: &str, pattern: &str, tail: &str| {
            let times = (LARGE - key.len() - head.len() - tail.len()) / pattern.len();
            [head, &pattern.repeat(times), tail].concat()
        };
        let uris: String = (0..LARGE / 32).map(|number| format!("uri{number} = \"test:///{number}\"; ")).collect();
        for (title, rest) in [
            ("many groups", much("groups {\n", group, "}\n")),
            ("one large group", much("groups { group { uuid = \"a\"; ", "ip = \"10.0.0.1\"; ", "} }\n")),
            ("a group of names and addresses", {
                let half = "name = \"a\"; ".repeat(LARGE / 26);
                much(&format!("groups {{ group {{ uuid = \"a\"; {half}"), "ip = \"10.0.0.1\"; ", "} }\n")
            }),
            ("many unknown keys on a line", much("", "portt = \"1\"; ", "\n")),
            ("many unknown sections", much("", "lissteners { }\n", "")),
            ("many URIs", format!("backends {{ libvirt {{ {uris} }} }}\n")),
            ("one URI many times", much("backends { libvirt { ", "uri = \"test:///\"; ", "} }\n")),
            ("many comments behind it", much("", "# comment\n", "")),
        ] {
            let config = folder.write("fence_virt.conf", format!("{key}{rest}").as_bytes());
            let ended = daemon(&config, &folder, Some(SMALL_STACK), None);
            check(title, &ended, Some(&format!("{}:2:36", config.display())), "does not exist");
            rows.push((title.to_owned(), ended.took, ended.stderr.len()));
        }
        table(&mut rows);
    }

    #[test]
    fn a_file_that_is_no_text_is_reported() {
        let folder = Folder::new();
        let ended = |path: &Path| daemon(path, &folder, None, None);
        check("a directory", &ended(folder.0.path()), None, "cannot read the configuration file");
        check("nothing", &ended(&folder.path("none.conf")), None, "cannot read the configuration file");
        check("through a file", &ended(&folder.write("f", b"x").join("g")), None, "cannot read the configuration file");
        std::os::unix::fs::symlink("loop", folder.path("loop")).unwrap();
        check("a loop", &ended(&folder.path("loop")), None, "cannot read the configuration file");
        let _socket = std::os::unix::net::UnixListener::bind(folder.path("socket")).unwrap();
        check("a socket", &ended(&folder.path("socket")), None, "cannot read the configuration file");
        check("/dev/zero", &ended(Path::new("/dev/zero")), Some("/dev/zero:1:4194305"), "is larger than");
        check("/dev/null", &ended(Path::new("/dev/null")), Some("/dev/null:1:1"), "configures nothing");
        nix::unistd::mkfifo(&folder.path("fifo"), Mode::S_IRWXU).unwrap();
        check("a FIFO without a writer", &ended(&folder.path("fifo")), None, "it is a pipe");
        let closed = daemon(Path::new("/dev/stdin"), &folder, None, Some(b"listeners {"));
        check("a pipe", &closed, Some("/dev/stdin:1:1"), "never closed");
    }

    #[test]
    fn a_key_that_cannot_be_used_points_at_the_line_that_names_it() {
        let folder = Folder::new();
        let key = folder.path("k");
        let config = |key: &Path| {
            format!("{GLOBAL}listeners {{\n\tmulticast {{\n\t\tkey_file = \"{}\";\n\t}}\n}}\n", key.display())
        };
        let refused = |title: &str, key: &Path, says: &str| {
            let path = folder.write("fence_virt.conf", config(key).as_bytes());
            let ended = daemon(&path, &folder, None, None);
            check(title, &ended, Some(&format!("{}:4:14", path.display())), says);
            assert!(ended.stderr.contains(key.to_str().unwrap()), "{title}: {}", ended.stderr);
        };
        refused("a missing key", &key, "does not exist");
        refused("a key in a missing folder", &key.join("in/none"), "does not exist");
        refused("an empty key", &folder.write("empty", b""), "is empty");
        refused("a directory", folder.0.path(), "not a regular file");
        refused("a device", Path::new("/dev/zero"), "not a regular file");
        nix::unistd::mkfifo(&folder.path("fifo"), Mode::S_IRWXU).unwrap();
        refused("a FIFO", &folder.path("fifo"), "not a regular file");
        // Root may read everything: a path through a file is unreadable to it too.
        refused("a path through a file", &folder.write("file", b"x").join("key"), "cannot read the key file");

        assert!(!folder.path("pid").exists(), "a start that failed left its PID file");
    }
}
