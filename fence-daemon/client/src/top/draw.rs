//! The lines that `top` shows of a report, as many as the terminal has.

use fence_control::report::{Cluster, Report};
use ratatui::Frame;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::rates::{Counter, HISTORY, Rates};
use crate::screen::bars;
use crate::screen::table::{Look, Screen, Table, flexible, number, text};
use crate::screen::words::{counters, harmless, meaning, micros, span, time_of_day};
use crate::status::hosts;
use crate::status::page::{Step, connection, look_of, requests};

/// The most counters shown. Those that grow come first.
const COUNTERS: usize = 8;
/// The steps of requests that are shown.
const STEPS: [Step; 2] = [("DEAD", |steps| steps.dead_us), ("REPLIED", |steps| steps.replied_us)];

/// The style of a look. Without colours, bold and dim remain.
fn style(look: Look, colours: bool) -> Style {
    let style = Style::new();
    let colour = |colour: Color| if colours { style.fg(colour) } else { style };
    match look {
        Look::Plain => style,
        Look::Good => colour(Color::Green),
        Look::Warn => colour(Color::Yellow),
        Look::Bad => colour(Color::Red).add_modifier(Modifier::BOLD),
        Look::Dim => style.add_modifier(Modifier::DIM),
        Look::Heading => style.add_modifier(Modifier::BOLD),
    }
}

fn line(parts: Vec<(Look, String)>, screen: Screen) -> Line<'static> {
    Line::from_iter(parts.into_iter().map(|(look, text)| Span::styled(text, style(look, screen.colours))))
}

fn one(look: Look, text: &str, screen: Screen) -> Line<'static> {
    let text = harmless(text);
    let text = screen.width.map_or(text.clone(), |width| screen.cut(&text, width));
    line(vec![(look, text)], screen)
}

/// What the display shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Page {
    /// This daemon: datagrams, libvirt, requests.
    #[default]
    Daemon,
    /// The hosts that answer together, and their domains.
    Hosts,
}

impl Page {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Daemon => Self::Hosts,
            Self::Hosts => Self::Daemon,
        }
    }
}

/// The state of the display.
#[derive(Debug, Default)]
pub struct TopState {
    /// What it shows, if the daemon has that.
    pub page: Page,
    /// The last report.
    pub report: Option<Report>,
    /// Why there is no newer report.
    pub error: Option<String>,
    /// How fast counters grow.
    pub rates: Rates,
}

impl TopState {
    /// Takes in a report.
    pub fn answered(&mut self, report: Report) {
        self.rates.update(&report);
        self.report = Some(report);
        self.error = None;
    }

    /// Draws on the terminal.
    pub fn draw(&self, frame: &mut Frame<'_>, colours: bool, unicode: bool) {
        let area = frame.area();
        let screen = Screen { colours, width: Some(area.width.into()), unicode };
        frame.render_widget(Paragraph::new(self.lines(screen, area.height.into())), area);
    }

    /// All lines. The last ones are requests, as many as fit.
    #[must_use]
    pub fn lines(&self, screen: Screen, height: usize) -> Vec<Line<'static>> {
        let mut lines = Vec::new();
        if let Some(error) = &self.error {
            lines.push(one(Look::Bad, &format!("no answer: {error}"), screen));
            lines.push(one(Look::Warn, "trying again each second; what is below is old", screen));
        }
        let Some(report) = &self.report else {
            if lines.is_empty() {
                lines.push(one(Look::Dim, "asking the daemon...", screen));
            }
            return lines;
        };
        lines.push(headline(report, screen));
        lines.extend(report.problems.iter().map(|problem| one(Look::Bad, &format!("! {problem}"), screen)));
        match &report.cluster {
            Some(cluster) if self.page == Page::Hosts => lines.extend(of_hosts(cluster, screen)),
            Some(_) | None => self.of_daemon(report, screen, height, &mut lines),
        }
        lines.truncate(height);
        lines
    }

    /// Adds the page of the daemon.
    fn of_daemon(&self, report: &Report, screen: Screen, height: usize, lines: &mut Vec<Line<'static>>) {
        if let Some(cluster) = &report.cluster {
            let is_well = cluster.quorate && cluster.hosts.iter().all(|host| host.present);
            let look = if is_well { Look::Plain } else { Look::Bad };
            lines.push(one(look, &format!("{} (h shows them)", hosts::title(cluster)), screen));
        }
        let mut section = |title: &str, table: &Table| {
            if !table.is_empty() {
                lines.push(Line::default());
                lines.push(one(Look::Heading, title, screen));
                lines.extend(table.lines(screen).into_iter().map(|parts| line(parts, screen)));
            }
        };
        section("Datagrams, kernel and socket together", &self.counters(screen));
        section("libvirt", &uris(report));
        section("From arrival to reply", &latency(report, screen));
        // A blank line, a title, a head.
        let room = height.saturating_sub(lines.len() + 3);
        let tally = &report.requests;
        let title = format!(
            "Requests: {} in progress, {} answered, {} unanswered, {} rejected, {} duplicates, {} replays",
            tally.in_progress, tally.answered, tally.unanswered, tally.rejected, tally.duplicates, tally.replays
        );
        lines.push(Line::default());
        lines.push(one(Look::Heading, &title, screen));
        lines.extend(requests(report, room, &STEPS, 0).lines(screen).into_iter().map(|parts| line(parts, screen)));
    }

    fn counters(&self, screen: Screen) -> Table {
        let mut table = Table::new([
            text("COUNTER"),
            number("PER SECOND"),
            number("TOTAL"),
            number("HALF A MINUTE"),
            flexible("", 0),
        ]);
        let known: Vec<&str> = counters().collect();
        let unknown = self.rates.names().filter(|name| !known.contains(name));
        let some = known.iter().copied().chain(unknown).filter_map(|name| Some((name, self.rates.get(name)?)));
        let mut some: Vec<(&str, &Counter)> = some.filter(|(_, counter)| counter.total > 0).collect();
        // Keeps the order, but counters that grow come before those that do not.
        some.sort_by_key(|(_, counter)| counter.history.iter().all(|rate| *rate == 0));
        for (name, counter) in some.into_iter().take(COUNTERS) {
            let rate = counter.rate();
            let look = match name {
                _ if rate == 0 => Look::Dim,
                "delivered" => Look::Good,
                _ => Look::Warn,
            };
            table.row([
                (Look::Plain, name.to_owned()),
                (look, rate.to_string()),
                (Look::Plain, counter.total.to_string()),
                (Look::Plain, history(counter, screen.unicode)),
                (Look::Dim, meaning(name).to_owned()),
            ]);
        }
        table
    }
}

/// The page of the hosts.
fn of_hosts(cluster: &Cluster, screen: Screen) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let sections = [
        (hosts::title(cluster), hosts::table(cluster)),
        ("Domains by host".to_owned(), hosts::domains(cluster, |_| true)),
    ];
    for (title, table) in sections.into_iter().filter(|(_, table)| !table.is_empty()) {
        lines.push(Line::default());
        lines.push(one(Look::Heading, &title, screen));
        lines.extend(table.lines(screen).into_iter().map(|parts| line(parts, screen)));
    }
    lines
}

/// The last half minute, at a fixed width so that nothing moves while it fills.
fn history(counter: &Counter, unicode: bool) -> String {
    let bars = bars::row(counter.history.iter().copied(), unicode);
    let missing = HISTORY.saturating_sub(counter.history.len());
    format!("{}{bars:<1$}", " ".repeat(missing), counter.history.len())
}

fn headline(report: &Report, screen: Screen) -> Line<'static> {
    let daemon = &report.daemon;
    let health = report.health.name();
    let keys = if report.cluster.is_some() { "q quits, h: hosts" } else { "q quits" };
    let rest = format!(
        "  ({keys})  fence-daemon {}, process {}, up {}; {}; at {}",
        daemon.version,
        daemon.pid,
        span(daemon.uptime_ms),
        report.status(),
        time_of_day(daemon.now_unix_ms),
    );
    let rest = harmless(&rest);
    let rest = screen.width.map_or(rest.clone(), |width| screen.cut(&rest, width.saturating_sub(health.len())));
    line(vec![(look_of(report.health), health.to_owned()), (Look::Plain, rest)], screen)
}

fn uris(report: &Report) -> Table {
    let mut table = Table::new([
        flexible("URI", 16),
        text("CONNECTION"),
        text("FOR"),
        number("DOMAINS"),
        number("PROCESSES"),
        flexible("", 0),
    ]);
    for uri in &report.uris {
        let waiting = report.restarts.iter().filter(|restart| restart.uri == uri.uri).count();
        let notes = if waiting > 0 { format!("{waiting} to be started again") } else { String::new() };
        table.row([
            (Look::Plain, uri.uri.clone()),
            connection(uri),
            (Look::Plain, uri.for_ms.map_or_else(|| "-".to_owned(), span)),
            (Look::Plain, uri.domains.len().to_string()),
            (Look::Plain, uri.domains.iter().filter(|domain| domain.pid.is_some()).count().to_string()),
            (Look::Warn, notes),
        ]);
    }
    table
}

fn latency(report: &Report, screen: Screen) -> Table {
    let replies = || report.latency.iter().filter(|latency| latency.step == "replied");
    let axis = bars::Axis::of(replies().flat_map(|latency| &latency.buckets));
    let mut table =
        Table::new([text("OP"), number("COUNT"), number("P50"), number("P99"), number("MAX"), text("DISTRIBUTION")]);
    for latency in replies() {
        table.row([
            (Look::Plain, latency.op.clone()),
            (Look::Plain, latency.count.to_string()),
            (Look::Plain, micros(latency.p50_us)),
            (Look::Plain, micros(latency.p99_us)),
            (Look::Plain, micros(latency.max_us)),
            (Look::Plain, axis.bars(&latency.buckets, screen.unicode)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::example::example;

    const SCREEN: Screen = Screen { width: Some(100), ..Screen::PLAIN };

    fn text(lines: &[Line<'_>]) -> Vec<String> {
        lines.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_screen_fits_any_terminal() {
        let mut state = TopState::default();
        state.answered(example());
        for height in [0, 1, 5, 24, 60] {
            for (width, page) in [0, 1, 20, 80, 200].into_iter().flat_map(|w| [(w, Page::Daemon), (w, Page::Hosts)]) {
                state.page = page;
                let lines = state.lines(Screen { width: Some(width), ..SCREEN }, height);
                assert!(lines.len() <= height);
                // The one word that is never cut is the daemon's health.
                assert!(lines.iter().skip(1).all(|line| line.width() <= width), "{width} {height}: {lines:?}");
            }
            state.page = Page::Daemon;
        }
        let all = text(&state.lines(SCREEN, 60)).join("\n");
        for words in
            ["degraded", "! lxc:///system", "drop_digest", "1 to be started again", "31.2 ms", "in progress", "q quits"]
        {
            assert!(all.contains(words), "{words}: {all}");
        }
        assert_eq!(text(&state.lines(SCREEN, 60)).iter().filter(|line| line.contains("192.168.122.1")).count(), 2);
    }

    /// What a terminal of 120 columns shows of this state. Lines of the page.
    fn on_a_terminal(state: &TopState) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(120, 30)).unwrap();
        terminal.draw(|frame| state.draw(frame, false, true)).unwrap();
        let cells = terminal.backend().buffer();
        let row = |y| (0..cells.area.width).map(|x| cells[(x, y)].symbol()).collect::<String>();
        let rows = (0..cells.area.height).map(row).map(|row| format!("    {row}").trim_end().to_owned());
        let mut rows: Vec<_> = rows.collect();
        while rows.last().is_some_and(String::is_empty) {
            rows.pop();
        }
        rows
    }

    /// Half a minute after the example, in which somebody has begun to flood.
    fn flooded() -> TopState {
        let mut state = TopState::default();
        let mut report = example();
        state.answered(report.clone());
        for second in 1..=30 {
            report.daemon.uptime_ms += 1000;
            report.daemon.now_unix_ms += 1000;
            let counters = report.kernel.as_mut().and_then(|kernel| kernel.counters.as_mut()).unwrap();
            *counters.get_mut("delivered").unwrap() += u64::from([12, 16, 27, 30].contains(&second));
            *counters.get_mut("drop_digest").unwrap() += if second > 27 { 612_044 } else { 0 };
            state.answered(report.clone());
        }
        state
    }

    /// `docs/reference/inspect.md` shows these below its headings. With `FENCE_WRITE_DOCS=1` they
    /// are written there.
    #[test]
    fn the_documentation_shows_what_it_looks_like() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/inspect.md");
        let hosts = TopState { page: Page::Hosts, report: Some(example()), ..TopState::default() };
        for (title, state) in [("## `fence-daemon top`", flooded()), ("### `top`'s page of the hosts", hosts)] {
            let page = std::fs::read_to_string(&path).unwrap();
            let lines: Vec<_> = page.lines().map(str::to_owned).collect();
            let heading = lines.iter().position(|line| line == title).unwrap();
            let from = heading + lines[heading..].iter().position(|line| line.starts_with("    ")).unwrap();
            let block = lines[from..].iter().take_while(|line| line.is_empty() || line.starts_with("    ")).count();
            // An empty line goes before what follows.
            let to = from + block - 1;
            let shown = on_a_terminal(&state);
            if std::env::var_os("FENCE_WRITE_DOCS").is_some() {
                let all = [&lines[..from], &shown, &lines[to..]].concat();
                std::fs::write(&path, all.join("\n") + "\n").unwrap();
                continue;
            }
            assert_eq!(
                lines[from..to],
                shown,
                "FENCE_WRITE_DOCS=1 cargo test -p fence-client the_documentation_shows writes it"
            );
        }
    }

    #[test]
    fn the_page_of_the_hosts_is_shown_where_there_are_any() {
        let mut state = TopState::default();
        state.answered(example());
        let daemon = text(&state.lines(SCREEN, 60)).join("\n");
        assert!(daemon.contains("2 of 3 hosts present, quorate (h shows them)"), "{daemon}");
        assert!(daemon.contains("q quits, h: hosts") && !daemon.contains("Domains by host"), "{daemon}");
        state.page = state.page.other();
        let hosts = text(&state.lines(SCREEN, 60)).join("\n");
        assert!(hosts.contains("Domains by host") && hosts.contains("node4"), "{hosts}");
        assert!(hosts.contains("! lxc:///system") && !hosts.contains("From arrival"), "{hosts}");
        state.report.as_mut().unwrap().cluster = None;
        let alone = text(&state.lines(SCREEN, 60)).join("\n");
        assert!(alone.contains("(q quits)") && alone.contains("From arrival"), "{alone}");
        assert_eq!(state.page.other(), Page::Daemon);
    }

    #[test]
    fn growing_counters_come_first() {
        let mut state = TopState::default();
        let mut report = example();
        state.answered(report.clone());
        report.daemon.uptime_ms += 1000;
        *report.socket.get_mut("drop_hash_weak").unwrap() += 9;
        state.answered(report);
        let lines = text(&state.lines(SCREEN, 60));
        let rows: Vec<_> = lines.iter().skip_while(|line| !line.contains("PER SECOND")).skip(1).collect();
        assert!(rows[0].starts_with("drop_hash_weak") && rows[0].contains(" 9 "), "{rows:?}");
        assert!(rows[1].starts_with("delivered") && rows[1].contains(" 0 "), "{rows:?}");
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_reported_and_what_was_known_stays() {
        let mut state = TopState::default();
        assert_eq!(text(&state.lines(SCREEN, 24)), ["asking the daemon..."]);
        state.error = Some("no daemon".to_owned());
        assert_eq!(text(&state.lines(SCREEN, 24))[0], "no answer: no daemon");
        state.answered(example());
        state.error = Some("no daemon".to_owned());
        let lines = text(&state.lines(SCREEN, 24));
        assert!(lines[1].contains("old") && lines[2].starts_with("degraded"), "{lines:?}");
        state.answered(example());
        assert!(text(&state.lines(SCREEN, 24))[0].starts_with("degraded"));
    }
}
