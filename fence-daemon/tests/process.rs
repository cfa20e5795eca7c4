//! Process life and logging of the daemon, each in its own process.
//!
//! This program runs itself again in a role that an environment variable names; without one it is
//! the test. It does not use the usual harness: a process that goes into the background must be
//! single-threaded.

fn main() -> std::process::ExitCode {
    life::main()
}

#[cfg(test)]
mod life {
    use std::io::Read;
    use std::os::unix::net::UnixDatagram;
    use std::path::{Path, PathBuf};
    use std::process::{Command, ExitCode, Output, Stdio};
    use std::time::{Duration, Instant};

    use fence_daemon::observe::logging::{self, Destination, LogTarget};
    use fence_daemon::process::{self, Readiness};
    use fence_daemon::state::pid_file::{PidFile, PidFileError};
    use fence_daemon::systemd;
    use libtest_mimic::{Arguments, Failed, Trial};
    use nix::sys::prctl;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::stat::{Mode, umask};

    const ROLE: &str = "FENCE_DAEMON_TEST_ROLE";
    const DIR: &str = "FENCE_DAEMON_TEST_DIR";
    /// A test, with its own directory.
    type Test = fn(&Path);

    const LIMIT: Duration = Duration::from_secs(20);

    pub(crate) fn main() -> ExitCode {
        if let Ok(role) = std::env::var(ROLE) {
            let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
            return play(&role, &dir);
        }
        let tests: &[(&str, Test)] = &[
            ("the_starter_waits_until_the_daemon_is_up", the_starter_waits_until_the_daemon_is_up),
            ("what_the_starter_left_open_is_closed", what_the_starter_left_open_is_closed),
            ("a_failed_start_is_seen_by_the_starter", a_failed_start_is_seen_by_the_starter),
            ("a_second_daemon_gives_up", a_second_daemon_gives_up),
            ("a_killed_daemon_leaves_a_file_to_take_over", a_killed_daemon_leaves_a_file_to_take_over),
            ("a_stock_server_counts_as_running", a_stock_server_counts_as_running),
            ("no_fork_beside_other_threads", no_fork_beside_other_threads),
            ("hardening_holds", hardening_holds),
            ("systemd_gets_the_messages", systemd_gets_the_messages),
            ("log_lines_in_the_foreground", log_lines_in_the_foreground),
            ("a_closed_standard_error_harms_nobody", a_closed_standard_error_harms_nobody),
            ("the_journal_in_the_background", the_journal_in_the_background),
            ("syslog_where_there_is_no_journal", syslog_where_there_is_no_journal),
        ];
        let trials = tests.iter().map(|&(name, test)| Trial::test(name, move || in_a_directory(test)));
        libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
    }

    fn in_a_directory(test: Test) -> Result<(), Failed> {
        let dir = tempfile::tempdir()?;
        test(dir.path());
        Ok(())
    }

    fn role(name: &str, dir: &Path) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(ROLE, name).env(DIR, dir).env_remove("RUST_LOG").env_remove("JOURNAL_STREAM").stdin(Stdio::null());
        command
    }

    fn run(name: &str, dir: &Path) -> Output {
        role(name, dir).output().unwrap()
    }

    fn stderr(output: &Output) -> String {
        String::from_utf8(output.stderr.clone()).unwrap()
    }

    fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn play(role: &str, dir: &Path) -> ExitCode {
        let pid_file = dir.join("x.pid");
        match role {
            "up" => {
                let mut readiness = process::daemonise().unwrap();
                let taken = match PidFile::take(&pid_file) {
                    Ok(taken) => taken,
                    Err(error) => {
                        eprintln!("fence-daemon: {error}");
                        return ExitCode::from(1);
                    }
                };
                eprintln!("nearly up");
                std::thread::sleep(Duration::from_millis(200));
                let before = link("2");
                readiness.announce().unwrap();
                let cwd = std::env::current_dir().unwrap();
                let leader = nix::unistd::getsid(None).unwrap() == nix::unistd::getpid();
                let report = [link("0"), link("1"), link("2"), cwd, PathBuf::from(leader.to_string()), before];
                std::fs::write(dir.join("report.new"), report.map(|path| path.display().to_string()).join("\n"))
                    .unwrap();
                std::fs::rename(dir.join("report.new"), dir.join("report")).unwrap();
                wait_until("stop", || dir.join("stop").exists());
                drop(taken);
                ExitCode::SUCCESS
            }
            "fails" => {
                let _readiness = process::daemonise().unwrap();
                eprintln!("fence-daemon: no such interface");
                ExitCode::from(7)
            }
            "dies" | "crashes" => {
                let _readiness = if role == "dies" { process::daemonise().unwrap() } else { Readiness::foreground() };
                let _taken = PidFile::take(&pid_file).unwrap();
                nix::sys::signal::raise(Signal::SIGKILL).unwrap();
                ExitCode::SUCCESS
            }
            "stock" => {
                prctl::set_name(c"fence_virtd").unwrap();
                std::fs::write(&pid_file, format!("{}\n", std::process::id())).unwrap();
                let _ = std::io::stdin().read(&mut [0]);
                ExitCode::SUCCESS
            }
            "threads" => {
                std::thread::spawn(|| std::thread::sleep(LIMIT));
                eprintln!("{}", process::daemonise().unwrap_err());
                ExitCode::from(9)
            }
            "hard" => {
                let (_, most) = getrlimit(Resource::RLIMIT_CORE).unwrap();
                setrlimit(Resource::RLIMIT_CORE, most, most).unwrap();
                let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
                setrlimit(Resource::RLIMIT_NOFILE, 256.min(files), files).unwrap();
                umask(Mode::empty());
                SigSet::all().thread_set_mask().unwrap();
                process::harden(2 * u64::try_from(fence_daemon::pipeline::SERVING_MAX).unwrap()).unwrap();
                assert!(!prctl::get_dumpable().unwrap());
                assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0));
                let wanted = 2 * u64::try_from(fence_daemon::pipeline::SERVING_MAX).unwrap();
                assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (wanted.min(files), files));
                assert_eq!(umask(Mode::empty()).bits(), 0o077);
                assert_eq!(SigSet::thread_get_mask().unwrap(), SigSet::empty());
                let status = std::fs::read_to_string("/proc/self/status").unwrap();
                let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
                let bit = |signal: Signal| u64::from_str_radix(ignored, 16).unwrap() >> (signal as u32 - 1) & 1;
                assert_eq!((bit(Signal::SIGPIPE), bit(Signal::SIGCHLD)), (1, 0));
                assert!(room_for_files() < wanted.min(files));
                process::make_room_for_files().unwrap();
                assert!(room_for_files() >= wanted.min(files));
                ExitCode::SUCCESS
            }
            "notifies" => {
                systemd::notify_status("serving\nREADY=1");
                let mut readiness = Readiness::foreground();
                readiness.announce().unwrap();
                // Logged once.
                readiness.announce().unwrap();
                systemd::notify_reloading();
                systemd::notify_ready();
                systemd::notify_stopping();
                ExitCode::SUCCESS
            }
            "logs" | "logs-more" => {
                let debug = if role == "logs" { 0 } else { 1 };
                assert_eq!(logging::init(debug, Destination::Foreground).unwrap(), LogTarget::Stderr);
                assert!(logging::init(debug, Destination::Foreground).is_err());
                tracing::info!(target: "fence_daemon::pipeline", domain = "node1", "fenced");
                tracing::debug!(target: "fence_daemon::pipeline", "a step");
                tracing::debug!(target: "elsewhere", "chatter");
                process::leave(0)
            }
            "logs-a-lot" => {
                logging::init(0, Destination::Foreground).unwrap();
                for _ in 0..1000 {
                    tracing::error!("nobody reads this");
                }
                process::leave(0)
            }
            "journal" | "syslog" => log_to_own_system(role),
            _ => panic!("no role {role}"),
        }
    }

    /// The size of the kernel's table of our open files.
    fn room_for_files() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        size.trim().parse().unwrap()
    }

    fn link(fd: &str) -> PathBuf {
        std::fs::read_link(Path::new("/proc/self/fd").join(fd)).unwrap()
    }

    fn the_starter_waits_until_the_daemon_is_up(dir: &Path) {
        let output = run("up", dir);
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), "nearly up\n"));
        let pid =
            std::fs::read_to_string(dir.join("x.pid")).expect("the PID file is there once the starter has exited");
        assert!(Path::new("/proc").join(pid.trim()).exists());
        wait_until("report", || dir.join("report").exists());
        let report = std::fs::read_to_string(dir.join("report")).unwrap();
        let (fixed, before) = report.rsplit_once('\n').unwrap();
        assert_eq!(fixed, "/dev/null\n/dev/null\n/dev/null\n/\ntrue");
        assert!(before.starts_with("pipe:"), "standard error leads to the starter's until then: {before}");
        std::fs::write(dir.join("stop"), "").unwrap();
        wait_until("end", || !dir.join("x.pid").exists());
    }

    fn what_the_starter_left_open_is_closed(dir: &Path) {
        let (mut reader, writer) = std::io::pipe().unwrap();
        rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).unwrap();
        let output = run("up", dir);
        assert_eq!(output.status.code(), Some(0));
        drop(writer);
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || ended.send(reader.read(&mut [0]).unwrap()));
        assert_eq!(end.recv_timeout(LIMIT), Ok(0), "the daemon holds a pipe of its parent");
        assert!(dir.join("x.pid").exists(), "the PID file is gone while the daemon runs");
        std::fs::write(dir.join("stop"), "").unwrap();
        wait_until("end", || !dir.join("x.pid").exists());
    }

    fn a_failed_start_is_seen_by_the_starter(dir: &Path) {
        let output = run("fails", dir);
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(7), "fence-daemon: no such interface\n"));
        let output = run("dies", dir);
        assert_eq!(
            (output.status.code(), stderr(&output).as_str()),
            (Some(1), "fence-daemon: ended by SIGKILL before it was up\n")
        );
    }

    fn a_second_daemon_gives_up(dir: &Path) {
        let _taken = PidFile::take(&dir.join("x.pid")).unwrap();
        let output = run("up", dir);
        let expected = format!("fence-daemon: already running as pid {} (", std::process::id());
        assert!(stderr(&output).starts_with(&expected), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(1));
    }

    fn a_killed_daemon_leaves_a_file_to_take_over(dir: &Path) {
        assert_eq!(run("crashes", dir).status.code(), None);
        assert!(dir.join("x.pid").exists());
        let _taken = PidFile::take(&dir.join("x.pid")).unwrap();
    }

    fn a_stock_server_counts_as_running(dir: &Path) {
        let mut stock = role("stock", dir).stdin(Stdio::piped()).spawn().unwrap();
        let file = dir.join("x.pid");
        wait_until("PID file", || std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n')));
        match PidFile::take(&file) {
            Err(PidFileError::AlreadyRunning { pid, .. }) => assert_eq!(pid, Some(stock.id())),
            other => panic!("{other:?}"),
        }
        drop(stock.stdin.take());
        stock.wait().unwrap();
        PidFile::take(&file).unwrap();
    }

    fn no_fork_beside_other_threads(dir: &Path) {
        let output = run("threads", dir);
        assert_eq!(stderr(&output), "cannot go into the background: other threads run already\n");
        assert_eq!(output.status.code(), Some(9));
    }

    fn hardening_holds(dir: &Path) {
        let output = run("hard", dir);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    fn systemd_gets_the_messages(dir: &Path) {
        let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let status = role("notifies", dir).env("NOTIFY_SOCKET", dir.join("notify")).status().unwrap();
        assert!(status.success());
        for expected in ["STATUS=serving READY=1\n", "READY=1\n"] {
            assert_eq!(received(&socket), expected);
        }
        // systemd needs the start time of the reload, to tell it from an earlier one.
        let reloading = received(&socket);
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|rest| rest.trim().parse().ok());
        assert!(since.is_some_and(|since: u64| since > 0), "{reloading:?}");
        for expected in ["READY=1\n", "STOPPING=1\n"] {
            assert_eq!(received(&socket), expected);
        }
    }

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 4096];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    fn log_lines_in_the_foreground(dir: &Path) {
        let usual = stderr(&run("logs", dir));
        assert!(usual.ends_with("  INFO fenced domain=\"node1\"\n"), "{usual:?}");
        assert_eq!((usual.lines().count(), usual.contains('\x1b')), (1, false), "{usual:?}");
        let more = stderr(&run("logs-more", dir));
        assert!(more.contains(" DEBUG fence_daemon::pipeline: a step\n") && !more.contains("chatter"), "{more:?}");
        let chosen = stderr(&role("logs-more", dir).env("RUST_LOG", "elsewhere=debug").output().unwrap());
        assert!(chosen.contains("chatter") && !chosen.contains("a step"), "{chosen:?}");
        let wrong = stderr(&role("logs", dir).env("RUST_LOG", "elsewhere=loud").output().unwrap());
        assert!(wrong.contains("RUST_LOG is not used") && wrong.contains("fenced"), "{wrong:?}");
    }

    fn a_closed_standard_error_harms_nobody(dir: &Path) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(role("logs-a-lot", dir).stderr(writer).status().unwrap().code(), Some(0));
    }

    fn the_journal_in_the_background(dir: &Path) {
        let output = run("journal", dir);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    fn syslog_where_there_is_no_journal(dir: &Path) {
        let output = run("syslog", dir);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// In its own mount namespace: /run and /dev are empty except for one socket, which this
    /// process reads.
    fn log_to_own_system(role: &str) -> ExitCode {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};

        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let mut flags = CloneFlags::CLONE_NEWNS;
        if !uid.is_root() {
            flags |= CloneFlags::CLONE_NEWUSER;
        }
        unshare(flags)
            .expect("run this test as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)");
        if !uid.is_root() {
            std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).unwrap();
            std::fs::write("/proc/self/setgroups", "deny").unwrap();
            std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).unwrap();
        }
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        for place in ["/run", "/dev"] {
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        }

        let path = if role == "journal" { "/run/systemd/journal/socket" } else { "/dev/log" };
        std::fs::create_dir_all(Path::new(path).parent().unwrap()).unwrap();
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let sink = logging::init(0, Destination::Background).unwrap();
        tracing::warn!(domain = "node1", "fenced\0 again");
        if role == "journal" {
            assert_eq!(sink, LogTarget::Journal);
            assert_eq!(received(&socket), "", "a first empty message tests the connection");
            let message = received(&socket);
            assert!(
                message.contains("PRIORITY\n\x01\0\0\0\0\0\0\x004\n") && message.contains("\0fence-daemon\n"),
                "{message:?}"
            );
            // journalctl shows this field alone, so it must have everything that an administrator
            // needs.
            assert!(message.contains("fenced\0 again domain=\"node1\"\n"), "{message:?}");
            assert!(message.contains("FENCE_DOMAIN\n\x05\0\0\0\0\0\0\0node1\n"), "{message:?}");
        } else {
            assert_eq!(sink, LogTarget::Syslog);
            let message = received(&socket);
            // Facility daemon (3), severity warning (4).
            assert!(message.starts_with("<28>"), "{message:?}");
            let expected = format!(" fence-daemon[{}]: fenced", std::process::id());
            assert!(message.contains(&expected) && message.contains("domain=\"node1\""), "{message:?}");
        }
        // The journal is gone: the daemon goes on.
        drop(socket);
        std::fs::remove_file(path).unwrap();
        tracing::warn!("to nobody");
        ExitCode::SUCCESS
    }
}
