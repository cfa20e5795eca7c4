//! `fence-daemon top`: watches the running daemon, refreshed each second.
//!
//! A thread asks over the control socket, so that a daemon that hangs does not block `q`. The
//! terminal is restored after any end but SIGKILL: ratatui's hook handles a panic, and signals that
//! end the process count as `q`.

pub mod draw;
pub mod rates;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use fence_common::exit::{EXIT_UNKNOWN, EXIT_USAGE};
use fence_control::client::{self, ClientError};
use fence_control::report::Report;
use nix::sys::signal::{SigSet, Signal};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyModifiers};

use self::draw::TopState;
use crate::screen::{self, complain};
use crate::status;

/// The interval between two questions to the daemon.
const EACH: Duration = Duration::from_secs(1);
/// How often the display looks for an answer or a signal.
const LOOK: Duration = Duration::from_millis(100);

/// Watches the daemon with this configuration until the user quits. Returns the exit code.
#[must_use]
pub fn run(config: &Path) -> u8 {
    if !io::stdout().is_terminal() {
        complain("fence-daemon: top wants a terminal; `fence-daemon status` does not");
        return EXIT_USAGE;
    }
    let ended = quit_signals().and_then(|quit| {
        let answers = ask(status::socket(config))?;
        with_terminal(|terminal| watch(terminal, &answers, &quit))
    });
    match ended {
        Ok(()) => 0,
        Err(error) => {
            complain(format_args!("fence-daemon: cannot use the terminal: {error}"));
            EXIT_UNKNOWN
        }
    }
}

/// Gives `work` the whole terminal, and restores it afterwards, also after a failed setup or a
/// panic.
///
/// # Errors
/// The terminal's, or what `work` returns.
pub fn with_terminal(work: impl FnOnce(&mut DefaultTerminal) -> io::Result<()>) -> io::Result<()> {
    let worked = ratatui::try_init().and_then(|mut terminal| work(&mut terminal));
    let restored = ratatui::try_restore();
    worked.and(restored)
}

/// A flag that a signal sets to end the program. Call it before any thread starts: threads inherit
/// the blocked signals.
fn quit_signals() -> io::Result<Arc<AtomicBool>> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
    signals.thread_block()?;
    let quit = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&quit);
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let _ = signals.wait();
        told.store(true, Ordering::Relaxed);
    })?;
    Ok(quit)
}

/// Asks the daemon each second and sends the result.
fn ask(socket: PathBuf) -> io::Result<Receiver<Result<Report, ClientError>>> {
    let (tell, answers) = sync_channel(1);
    thread::Builder::new().name("ask".to_owned()).spawn(move || {
        loop {
            let answer = client::ask(&socket).and_then(|answer| client::parse(&answer));
            if tell.send(answer).is_err() {
                return;
            }
            thread::sleep(EACH);
        }
    })?;
    Ok(answers)
}

fn watch(
    terminal: &mut DefaultTerminal,
    answers: &Receiver<Result<Report, ClientError>>,
    quit: &AtomicBool,
) -> io::Result<()> {
    let (colours, unicode) = (screen::wants_colours(), screen::speaks_unicode());
    let mut state = TopState::default();
    let mut draw = true;
    while !quit.load(Ordering::Relaxed) {
        for answer in answers.try_iter() {
            match answer {
                Ok(report) => state.answered(report),
                Err(error) => state.error = Some(error.to_string()),
            }
            draw = true;
        }
        if std::mem::take(&mut draw) {
            terminal.draw(|frame| state.draw(frame, colours, unicode))?;
        }
        if event::poll(LOOK)? {
            let event = event::read()?;
            if let Some(key) = event.as_key_press_event() {
                if is_quit(key) {
                    return Ok(());
                }
                if matches!(key.code, KeyCode::Char('h' | 'H')) {
                    state.page = state.page.other();
                    draw = true;
                }
            }
            draw |= event.is_resize();
        }
    }
    Ok(())
}

fn is_quit(key: KeyEvent) -> bool {
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    control_c || matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc)
}
