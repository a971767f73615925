//! Tables for people: columns as wide as their widest cell, cut to the terminal, and nothing after the last cell of a line.

use super::screen::{Colour, Screen, plain};

/// Narrowest a column is cut to.
const NARROW: usize = 8;
/// Between two columns.
const GAP: &str = "  ";

/// One cell: text that cannot steer a terminal.
#[derive(Debug, Clone)]
pub(super) struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl Cell {
    pub(super) fn coloured(text: impl AsRef<str>, colour: Colour) -> Self {
        Self { text: plain(text.as_ref()), colour: Some(colour) }
    }
}
impl<T: ToString> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: plain(&text.to_string()), colour: None }
    }
}

/// Rows under headings. A heading that begins with `>` belongs to a column of numbers, aligned to the right.
#[derive(Debug)]
pub(super) struct Table {
    headings: &'static [&'static str],
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(super) fn new(headings: &'static [&'static str]) -> Self {
        Self { headings, rows: Vec::new() }
    }

    /// Adds a row: a cell for each heading.
    pub(super) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        self.rows.push(cells.into());
    }

    /// The table as text; `nothing` if it has no rows.
    pub(super) fn render(&self, screen: &Screen, nothing: &str) -> String {
        if self.rows.is_empty() {
            return format!("{nothing}\n");
        }
        let titles: Vec<Cell> =
            self.headings.iter().map(|h| Cell { text: h.trim_start_matches('>').into(), colour: Some(Colour::Bold) }).collect();
        let lines: Vec<&Vec<Cell>> = std::iter::once(&titles).chain(&self.rows).collect();
        let widths = self.widths(&lines, screen.width);
        lines.iter().map(|cells| self.line(cells, &widths, screen)).collect()
    }

    fn widths(&self, lines: &[&Vec<Cell>], room: Option<usize>) -> Vec<usize> {
        let widest = |at: usize| lines.iter().filter_map(|l| l.get(at)).map(|c| c.text.chars().count()).max().unwrap_or(0);
        let mut widths: Vec<usize> = (0..self.headings.len()).map(widest).collect();
        let gaps = GAP.len() * widths.len().saturating_sub(1);
        let Some(room) = room else { return widths };
        let mut excess = (widths.iter().sum::<usize>() + gaps).saturating_sub(room);
        while excess > 0 {
            let Some(widest) = widths.iter_mut().max_by_key(|w| **w).filter(|w| **w > NARROW) else { break };
            *widest -= 1;
            excess -= 1;
        }
        widths
    }

    fn line(&self, cells: &[Cell], widths: &[usize], screen: &Screen) -> String {
        let mut line = String::new();
        for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
            let text = cut(&cell.text, *width);
            let pad = " ".repeat(width - text.chars().count());
            let text = cell.colour.map_or_else(|| text.clone(), |c| screen.paint(c, &text));
            let number = self.headings.get(at).is_some_and(|h| h.starts_with('>'));
            if at > 0 {
                line.push_str(GAP);
            }
            match number {
                true => line.extend([pad, text]),
                false if at + 1 == cells.len() => line.push_str(&text),
                false => line.extend([text, pad]),
            }
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

/// `text` in at most `width` characters; the last is an ellipsis if some are missing.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut t = Table::new(&["NAME", ">N", "WHY"]);
        t.row(["a".into(), 1.into(), "short".into()]);
        t.row([Cell::coloured("a-long-name", Colour::Red), 1234.into(), "a reason of some length\x1b[2J".into()]);
        t
    }

    #[test]
    fn aligned_and_uncut_without_a_terminal() {
        let text = table().render(&Screen::fixed(false, None), "none");
        assert_eq!(
            text,
            "NAME            N  WHY\na               1  short\na-long-name  1234  a reason of some length\\u{1b}[2J\n"
        );
    }

    #[test]
    fn cut_to_the_terminal_widest_first() {
        let text = table().render(&Screen::fixed(false, Some(30)), "none");
        assert!(text.lines().all(|l| l.chars().count() <= 30), "{text}");
        assert!(text.contains("a-long-name  1234  a reason o…"), "{text}");
        // A terminal too narrow for anything still gets every column.
        assert!(table().render(&Screen::fixed(false, Some(1)), "none").contains("WHY"));
    }

    #[test]
    fn colours_do_not_count_as_width() {
        let coloured = table().render(&Screen::fixed(true, None), "none");
        let bare = coloured.replace("\x1b[1m", "").replace("\x1b[31m", "").replace("\x1b[0m", "");
        assert_eq!(bare, table().render(&Screen::fixed(false, None), "none"));
        assert_eq!(Table::new(&["A"]).render(&Screen::fixed(true, None), "nothing here"), "nothing here\n");
    }
}
