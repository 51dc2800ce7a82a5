//! Small line and bar charts as SVG, without a library: a report has to open anywhere, also without a network.

use std::fmt::Write;

/// How the points of a chart are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Points joined by a line.
    Line,
    /// Bars from the axis.
    Bar,
}

/// Points with a name.
#[derive(Debug, Clone)]
pub struct Series {
    /// Shown in the legend, unless it is the only one.
    pub name: String,
    /// (x, y), in order of x.
    pub points: Vec<(f64, f64)>,
}

/// A chart.
#[derive(Debug, Clone)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Whether the vertical axis is logarithmic; values that are not positive are then left out.
    pub log_y: bool,
    /// How points are drawn.
    pub mark: Mark,
    /// What is drawn.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 48.0;
const COLOURS: [&str; 6] = ["#3266ad", "#c0504d", "#4f8f3a", "#8062a0", "#d08a2a", "#3a9fa8"];

impl Chart {
    /// The chart as an SVG element of its own.
    pub fn svg(&self) -> String {
        let keep = |&&(x, y): &&(f64, f64)| x.is_finite() && y.is_finite() && !(self.log_y && y <= 0.0);
        let points: Vec<(f64, f64)> = self.series.iter().flat_map(|s| &s.points).filter(keep).copied().collect();
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" font-family=\"sans-serif\" \
             font-size=\"12\" fill=\"#444\"><rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\
             <text x=\"{LEFT}\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>",
            escape(&self.title)
        );
        if points.is_empty() {
            out += "<text x=\"320\" y=\"150\" text-anchor=\"middle\">no data</text></svg>";
            return out;
        }
        let span = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)))
        };
        let (mut x0, mut x1) = span(&mut points.iter().map(|p| p.0));
        let (mut y0, mut y1) = span(&mut points.iter().map(|p| p.1));
        if self.log_y {
            (y0, y1) = (y0.log10().floor(), y1.log10().ceil());
        } else {
            y0 = y0.min(0.0);
        }
        if self.mark == Mark::Bar {
            // Half a bar of room at both ends.
            let room = (x1 - x0) / (2.0 * points.len().max(2) as f64 - 2.0).max(1.0);
            (x0, x1) = (x0 - room.max(0.5), x1 + room.max(0.5));
        }
        if x0 == x1 {
            (x0, x1) = (x0 - 1.0, x1 + 1.0);
        }
        if y0 == y1 {
            y1 = y0 + 1.0;
        }
        let x_at = |x: f64| LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
        let y_of = |t: f64| HEIGHT - BOTTOM - (t - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
        let y_at = |y: f64| y_of(if self.log_y { y.log10() } else { y });

        let y_ticks: Vec<(f64, String)> = match self.log_y {
            true => (y0 as i32..=y1 as i32).map(|e| (f64::from(e), format!("1e{e}"))).collect(),
            false => ticks(y0, y1).into_iter().map(|t| (t, number(t))).collect(),
        };
        for (tick, text) in y_ticks {
            let y = y_of(tick);
            let _ = write!(
                out,
                "<path d=\"M{LEFT} {y:.1}H{}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0
            );
        }
        for tick in ticks(x0, x1) {
            let x = x_at(tick);
            let _ = write!(
                out,
                "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM + 16.0,
                number(tick)
            );
        }
        let _ = write!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 8.0,
            escape(&self.x_label),
            (TOP + HEIGHT - BOTTOM) / 2.0,
            escape(&self.y_label)
        );
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let points: Vec<(f64, f64)> = series.points.iter().filter(keep).map(|&(x, y)| (x_at(x), y_at(y))).collect();
            match self.mark {
                Mark::Line => {
                    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
                    let _ = write!(
                        out,
                        "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                        path.join("L")
                    );
                    for (x, y) in &points {
                        let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>");
                    }
                }
                Mark::Bar => {
                    let room = (WIDTH - LEFT - RIGHT) / (points.len().max(1) as f64) * 0.8;
                    let width = room / self.series.len() as f64;
                    for (x, y) in &points {
                        let left = x - room / 2.0 + i as f64 * width;
                        let _ = write!(
                            out,
                            "<rect x=\"{left:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                            (HEIGHT - BOTTOM - y).max(0.0)
                        );
                    }
                }
            }
            if self.series.len() > 1 {
                let y = TOP + 14.0 * i as f64;
                let _ = write!(
                    out,
                    "<rect x=\"{}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\
                     <text x=\"{}\" y=\"{:.1}\">{}</text>",
                    WIDTH - RIGHT - 150.0,
                    y - 9.0,
                    WIDTH - RIGHT - 135.0,
                    y,
                    escape(&series.name)
                );
            }
        }
        out += "</svg>";
        out
    }
}

/// Four to eight round values between `low` and `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw).unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|&t| t <= high + step * 1e-9).take(20).collect()
}

/// As few digits as tell it apart.
fn number(v: f64) -> String {
    let text = format!("{v:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Text as it may stand in XML and HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(mark: Mark, log_y: bool, points: Vec<(f64, f64)>) -> String {
        let series = vec![Series { name: "a & b".into(), points }, Series { name: "c".into(), points: vec![] }];
        Chart { title: "<t>".into(), x_label: "x".into(), y_label: "y".into(), log_y, mark, series }.svg()
    }

    #[test]
    fn odd_data_draws_without_a_number_that_is_none() {
        for mark in [Mark::Line, Mark::Bar] {
            for log_y in [false, true] {
                for points in [
                    vec![],
                    vec![(1.0, 1.0)],
                    vec![(0.0, 0.0), (1.0, 0.0)],
                    vec![(0.0, f64::NAN), (1.0, 5.0), (2.0, -1.0)],
                    (0..50).map(|i| (f64::from(i), f64::from(i) * 1e6)).collect(),
                ] {
                    let svg = chart(mark, log_y, points);
                    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>"), "{svg}");
                    assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.contains("&lt;t&gt;"), "{svg}");
                }
            }
        }
    }

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(-3.0, 7.0), [-2.0, 0.0, 2.0, 4.0, 6.0]);
        assert_eq!((number(0.6000000000000001), number(-0.0), number(120.0)), ("0.6".into(), "0".into(), "120".into()));
    }
}
